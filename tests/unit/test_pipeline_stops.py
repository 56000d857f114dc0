"""Why the pipeline stops: events that cannot be published, redrives, topics that nobody has looked for."""

import gc
import weakref
from collections import Counter
from typing import Any

import pytest

from cdc_outbox.errors import OperatorNeeded, PoisonEvent
from cdc_outbox.relay.policy.document import read_policy
from cdc_outbox.relay.policy.gate import Gates
from cdc_outbox.relay.router import Record, Strays
from cdc_outbox.relay.stops import NewTopic, Parking
from cdc_outbox.wal.lsn import LSN
from cdc_outbox.wal.position import Position
from support import frames
from support.pipeline import (
    OUTBOX,
    RELATION,
    REQUEST,
    FakePublisher,
    event,
    make,
    redrive,
    transaction,
)


def test_poison_and_refusals_are_located() -> None:
    publisher = FakePublisher()
    driver = make(publisher)
    driver.feed([RELATION, frames.begin(0x10), event(1), frames.insert(7, [b"e", b"order", None, b"t", b"{}"])])
    publisher.refuse = True
    driver.feed([event(3)])
    null_key, refused = driver.kept
    assert (null_key.position, null_key.poison.message) == ((0x10, 2), "the aggregate id is NULL")
    assert (refused.position, refused.refused_by) == ((0x10, 3), "outbox.order")
    assert refused.poison.message == "refused by outbox.order: Refused()"
    assert driver.watermark.outstanding == 1


def test_what_is_put_away_is_settled_and_the_rest_flows() -> None:
    publisher = FakePublisher()
    driver = make(publisher)
    null_key = frames.insert(7, [b"e2", b"order", None, b"t", b"{}"])
    no_topic = frames.insert(7, [b"e3", b"a b", b"a", b"t", b"{}"])
    cut_short = event(4)[:-1]
    driver.feed([RELATION, *transaction(10, event(1), null_key, no_topic, cut_short, event(5))])
    assert [record[7][0][1] for record in publisher.taken] == [b"e1", b"e5"]
    assert [(*letter.position, letter.poison.reason) for letter in driver.kept] == [
        (10, 2, "aggregate_id_null"),
        (10, 3, "topic_not_allowed"),
        (10, 4, "undecodable"),
    ]
    known, routed, unread = (letter.event for letter in driver.kept)
    assert (known.event_id, known.aggregate_id, known.topic, known.payload) == ("e2", None, "outbox.order", b"{}")
    assert (routed.aggregate_type, routed.event_type, routed.topic) == ("a b", "t", "outbox.a b")
    assert (unread.event_id, unread.payload) == (None, cut_short[25:])
    publisher.deliver()
    assert [batch.per_topic for batch in driver.watermark.advance()] == [{"outbox.order": 2}]
    assert driver.watermark.settled_lsn == 11


def test_what_the_client_refuses_is_put_away() -> None:
    publisher = FakePublisher()
    driver = make(publisher)
    driver.feed([RELATION, frames.begin(10)])
    publisher.refuse = True
    driver.feed([event(1)])
    publisher.refuse = False
    driver.feed([event(2), frames.commit(10, 11)])
    assert [letter.event.event_id for letter in driver.kept] == ["e1"]
    assert driver.watermark.outstanding == 1
    publisher.deliver()
    (batch,) = driver.watermark.advance()
    assert +Counter(batch.per_topic) == {"outbox.order": 1}


def test_a_payload_that_is_no_bytea_is_put_away_as_it_came() -> None:
    driver = make(FakePublisher())
    row = frames.insert(7, [b"e1", b"order", b"a", b"t", b"\\xzz"])
    relation = frames.relation(7, "outbox", {**OUTBOX, "payload": 17})
    driver.feed([relation, *transaction(10, row)])
    (letter,) = driver.kept
    assert (letter.poison.reason, letter.event.payload) == ("undecodable", row[25:])


@pytest.mark.parametrize("one_by_one", [False, True])
def test_what_was_put_away_before_is_passed_over(one_by_one: bool) -> None:  # noqa: FBT001
    publisher = FakePublisher()
    driver = make(publisher, settled=[Position(20, 2)])
    if one_by_one:
        driver.pipeline.publish_one_by_one()
    events = [event(number) for number in (1, 2, 3)]
    driver.feed([RELATION, *transaction(10, *events), *transaction(20, *events), *transaction(30, *events)])
    assert [record[7][0][1] for record in publisher.taken] == [b"e1", b"e2", b"e3", b"e1", b"e3", b"e1", b"e2", b"e3"]
    assert driver.kept == []


def test_a_redrive_is_published_in_its_place() -> None:
    publisher = FakePublisher()
    driver = make(publisher)
    requests = frames.relation(9, "request", REQUEST, namespace="cdc_outbox")
    driver.records[5] = Record("outbox.order", b"old", b"k", [("id", b"e0")])
    driver.records[6] = Record("secret", b"old", b"k", [])
    first, second, third = (redrive(1, number) for number in (5, 6, 7))
    driver.feed([RELATION, requests, *transaction(10, event(1), first, second, third, event(2))])
    assert [record[:3] for record in publisher.taken] == [
        ("outbox.order", b"{}", b"a"),
        ("outbox.order", b"old", b"k"),
        ("outbox.order", b"{}", b"a"),
    ]
    assert publisher.taken[1][7] == [("id", b"e0"), ("cdc-outbox-redriven", b"5")]
    assert driver.refused == [(6, "topic_not_allowed")]
    assert list(driver.watermark.advance()) == []
    publisher.deliver()
    assert [batch.redriven for batch in driver.watermark.advance()] == [[(1, 5)]]


def test_a_redrive_that_can_never_fit_is_refused_and_counted_out() -> None:
    publisher = FakePublisher()
    driver = make(publisher)
    driver.make_room = driver.no_room_will_come
    requests = frames.relation(9, "request", REQUEST, namespace="cdc_outbox")
    driver.records[5] = Record("outbox.order", b"x" * 100, b"k", [])
    driver.feed([RELATION, requests, frames.begin(10)])
    publisher.room = 0
    driver.feed([redrive(1, 5)])
    publisher.room = 10
    driver.feed([event(1), frames.commit(10, 11)])
    publisher.deliver()
    assert driver.refused == [(5, "queue_too_small")]
    assert [batch.redriven for batch in driver.watermark.advance()] == [[]]
    assert driver.watermark.settled_lsn == 11


def test_an_event_that_can_never_fit_is_put_away() -> None:
    publisher = FakePublisher(room=0)
    driver = make(publisher)
    driver.make_room = driver.no_room_will_come
    driver.feed([RELATION, *transaction(10, event(1))])
    assert [letter.poison.reason for letter in driver.kept] == ["queue_too_small"]
    list(driver.watermark.advance())
    assert driver.watermark.settled_lsn == 11


@pytest.mark.parametrize("one_by_one", [False, True])
def test_what_is_parked_holds_no_publisher(one_by_one: bool) -> None:  # noqa: FBT001
    """It would live on, with its threads, until the collector runs."""
    publisher = FakePublisher()
    driver = make(publisher)
    if one_by_one:
        driver.pipeline.publish_one_by_one()
    gc.disable()
    try:
        driver.feed([RELATION, *transaction(10, frames.insert(7, [b"e", b"order", None, b"t", b"{}"]))])
        kept, left = driver.kept, weakref.ref(publisher)
        del publisher, driver
        assert (len(kept), left()) == (1, None)
    finally:
        gc.enable()


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("row", [event(2), redrive(1, 5)], ids=["event", "redrive"])
def test_whatever_is_raised_what_is_counted_in_is_in_flight(row: bytes, one_by_one: bool) -> None:  # noqa: FBT001
    class Interrupting(FakePublisher):
        def publish(self, *record: Any) -> None:
            if len(self.taken) == 1:
                raise Interrupted
            super().publish(*record)

    publisher = Interrupting()
    driver = make(publisher)
    if one_by_one:
        driver.pipeline.publish_one_by_one()
    driver.records[5] = Record("outbox.order", b"x", b"k", [])
    requests = frames.relation(9, "request", REQUEST, namespace="cdc_outbox")
    driver.feed([RELATION, requests, frames.begin(10), event(1)])
    with pytest.raises(Interrupted):
        driver.feed([row])
    assert driver.watermark.outstanding == len(publisher.taken) == 1
    assert +Counter(driver.watermark.current.per_topic) == {"outbox.order": 1}
    assert driver.watermark.current.redriven == []


def test_a_new_topic_is_looked_for_once_and_its_event_waits() -> None:
    publisher = FakePublisher()
    driver = make(publisher)
    other = frames.insert(7, [b"e2", b"other", b"a", b"t", b"{}"])
    driver.feed([RELATION, *transaction(10, event(1), other, event(3), other)])
    assert driver.topics == ["outbox.order", "outbox.other"]
    assert [record[0] for record in publisher.taken] == ["outbox.order", "outbox.other"] * 2


def test_an_event_whose_topic_is_not_there_is_put_away_or_raised() -> None:
    driver = make(FakePublisher())
    frames_left = iter([RELATION, *transaction(10, event(1), event(2))])
    assert driver.pipeline.feed(frames_left) == NewTopic("outbox.order")
    missing = driver.pipeline.refuse(PoisonEvent("no such topic", reason="topic_missing"))
    assert isinstance(missing, Parking)
    assert (missing.event.event_id, missing.position, missing.refused_by) == ("e1", (10, 1), "")
    assert driver.pipeline.feed(frames_left) == NewTopic("outbox.order")
    with pytest.raises(OperatorNeeded, match="forbidden"):
        driver.pipeline.refuse(OperatorNeeded("forbidden"))


@pytest.mark.parametrize("row", [event(2), redrive(1, 5)], ids=["event", "redrive"])
def test_one_by_one_the_last_event_can_be_withdrawn(row: bytes) -> None:
    publisher = FakePublisher()
    driver = make(publisher)
    driver.pipeline.publish_one_by_one()
    driver.records[5] = Record("outbox.order", b"x", b"k", [])
    requests = frames.relation(9, "request", REQUEST, namespace="cdc_outbox")
    driver.feed([RELATION, requests, frames.begin(10), event(1)])
    driver.feed([row])
    driver.act_on(driver.pipeline.withdraw(PoisonEvent("refused", reason="refused")))
    driver.feed([event(3), frames.commit(10, 11)])
    assert [letter.event.event_id for letter in driver.kept] == (["e2"] if row == event(2) else [])
    assert driver.refused == ([] if row == event(2) else [(5, "refused")])
    del publisher.taken[1]  # its report has come
    publisher.deliver()
    (batch,) = driver.watermark.advance()
    assert (batch.outstanding, batch.redriven, +Counter(batch.per_topic)) == (0, [], {"outbox.order": 2})


def test_what_is_owed_is_recorded_before_the_watermark_moves() -> None:
    publisher = FakePublisher()
    driver = make(publisher)
    driver.feed([RELATION, *transaction(10, event(1))])
    publisher.deliver()
    for _ in driver.watermark.advance():
        assert driver.watermark.settled_lsn == 0
        break  # recording it has failed
    assert driver.watermark.settled_lsn == 0
    assert len(list(driver.watermark.advance())) == 1
    assert driver.watermark.settled_lsn == 11


def test_a_row_that_nobody_routes_stops_the_stream_where_its_table_is_listed() -> None:
    stranger = frames.relation(8, "stranger", {"a": 23})
    row = frames.insert(8, [b"1"])
    make(FakePublisher(), strays=Strays(frozenset())).feed([RELATION, stranger, *transaction(10, row)])
    driver = make(FakePublisher(), strays=Strays(None))
    driver.feed([RELATION, stranger, *transaction(10)])
    with pytest.raises(OperatorNeeded, match=r"a row of table public\.stranger has come"):
        driver.feed(transaction(20, row))


def activation(number: int) -> bytes:
    return frames.insert(9, [b"%d" % number, b"s", b"policy", None, None, None, b"version = 1", b"why", b"me"])


def test_a_policy_governs_what_comes_behind_it() -> None:
    publisher = FakePublisher()
    driver = make(publisher)
    driver.gates = Gates(read_policy(b'version = 1\n[[rule]]\nid = "r"\nwhen = {topic = "x"}\nverdict = "allow"\n'))
    requests = frames.relation(9, "request", REQUEST, namespace="cdc_outbox")
    driver.feed([RELATION, requests, *transaction(10, event(1), activation(1), event(2)), *transaction(20, event(3))])
    assert [record[1] for record in publisher.taken] == [b"{}"]
    assert [denied.position for denied in driver.denied] == [Position(LSN(10), 3), Position(LSN(20), 1)]
    assert {denied.ruling.rule for denied in driver.denied} == {""}
    assert [denied.event.event_id for denied in driver.denied] == ["e2", "e3"]
    publisher.deliver()
    assert [batch.end_lsn for batch in driver.watermark.advance()] == [21]
    assert driver.pipeline.acknowledged_events == 3


def test_a_denied_event_is_found_denied_one_by_one_too() -> None:
    publisher = FakePublisher()
    driver = make(publisher)
    driver.pipeline.govern(Gates(read_policy(b"version = 1")))
    driver.pipeline.publish_one_by_one()
    driver.feed([RELATION, *transaction(10, event(1), event(2))])
    assert publisher.taken == []
    assert len(driver.denied) == 2
    assert driver.watermark.outstanding == 0


def test_a_policy_needs_no_topic_to_deny() -> None:
    driver = make(FakePublisher())
    driver.pipeline.govern(Gates(read_policy(b"version = 1")))
    driver.feed([RELATION, *transaction(10, frames.insert(7, [b"e", b"no topic", b"a", b"t", b"{}"]))])
    assert driver.topics == []
    assert [denied.record.topic for denied in driver.denied] == ["outbox.no topic"]


def test_what_is_denied_by_its_types_is_denied_whatever_else_is_wrong_with_it() -> None:
    driver = make(FakePublisher())
    driver.pipeline.govern(Gates(read_policy(b"version = 1")))
    no_key = frames.insert(7, [b"e", b"order", None, b"t", b"{}"])
    driver.feed([RELATION, *transaction(10, no_key, event(2))])
    assert [denied.event.event_id for denied in driver.denied] == ["e", "e2"]
    assert driver.kept == []
    source = b'version = 1\n[[rule]]\nid = "r"\nwhen = { "payload.x" = 1 }\nverdict = "allow"\n'
    driver.pipeline.govern(Gates(read_policy(source)))
    driver.feed(transaction(20, no_key))
    assert [parking.poison.reason for parking in driver.kept] == ["aggregate_id_null"], "it was not judged"
