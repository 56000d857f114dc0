from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_outbox.errors import CdcOutboxError, MalformedStream, OperatorNeeded, PoisonEvent
from cdc_outbox.relay.dead_letters import DeadLetter, DeadLetters, RedriveRequest
from cdc_outbox.relay.pipeline import BATCH_EVENTS, Pipeline
from cdc_outbox.relay.router import Outbox, Record, Router, Routing, Strays
from cdc_outbox.relay.topic_template import TopicTemplate
from cdc_outbox.service.state import Stateless
from support import frames

OUTBOX = {"id": 2950, "aggregate_type": 25, "aggregate_id": 25, "event_type": 25, "payload": 114}
RELATION = frames.relation(7, "outbox", OUTBOX)
REQUEST = {"id": 20, "slot": 25, "dead_letter_id": 20, "topic": 25, "key": 25}


class Refused(Exception):
    pass


class FakePublisher:
    """Takes what is published; delivers when told."""

    refusal: type[Exception] = Refused

    def __init__(self, *, room: int = 10**9) -> None:
        self.room = room
        self.taken: list[tuple[Any, ...]] = []
        self.refuse = False

    def publish(self, *record: Any) -> None:
        if self.refuse:
            raise Refused
        if not self.room:
            raise BufferError
        self.room -= 1
        self.taken.append(record)

    def deliver(self, count: int | None = None) -> None:
        for record in self.taken[:count]:
            record[4](None, None)
        del self.taken[:count]

    def explain(self, refusal: Any, topic: str) -> CdcOutboxError:
        return PoisonEvent(f"refused by {topic}: {refusal!r}", reason="refused")

    def on_failure(self, error: Any, message: Any) -> None:
        raise AssertionError(error, message)


class FakeDeadLetters:
    """Keeps what is put away; gives what it was told to."""

    def __init__(self) -> None:
        self.kept: list[DeadLetter] = []
        self.settled: dict[int, frozenset[int]] = {}
        self.records: dict[int, Record] = {}
        self.refused: list[tuple[int, str]] = []

    def put(self, letter: DeadLetter) -> None:
        self.kept.append(letter)

    def settled_ordinals(self, commit_lsn: int) -> frozenset[int]:
        return self.settled.get(commit_lsn, frozenset())

    def take(self, request: RedriveRequest) -> Record | None:
        return self.records.get(request.dead_letter_id)

    def refused_again(self, request: RedriveRequest, poison: PoisonEvent) -> None:
        self.refused.append((request.dead_letter_id, poison.reason))


def make(
    publisher: FakePublisher,
    wait_for_room: Any = None,
    dead_letters: DeadLetters | None = None,
    strays: Strays | None = None,
) -> Pipeline:
    outbox = Outbox("public", "outbox", {name: (name,) for name in OUTBOX})
    router = Router(outbox, TopicTemplate("outbox.{aggregate_type}"), "plain", "", lambda _: None)
    routing = Routing([router], strays or Strays())
    return Pipeline(routing, publisher, dead_letters or Stateless(), wait_for_room or (lambda: pytest.fail("no room")))


def event(number: int) -> bytes:
    return frames.insert(7, [b"e%d" % number, b"order", b"a", b"t", b"{}"])


def transaction(commit_lsn: int, *events: bytes) -> list[bytes]:
    return [frames.begin(commit_lsn, time_us=1000), *events, frames.commit(commit_lsn, commit_lsn + 1)]


def test_one_event_walks_through() -> None:
    publisher = FakePublisher()
    pipeline = make(publisher)
    pipeline.feed([RELATION, *transaction(10, event(1))])
    (record,) = publisher.taken
    assert record[:4] == ("outbox.order", b"{}", b"a", -1)
    assert record[6:] == (946_684_800_001, [("id", b"e1"), ("type", b"t")])
    assert list(pipeline.watermark.advance()) == []
    publisher.deliver()
    (batch,) = pipeline.watermark.advance()
    assert pipeline.watermark.settled_lsn == 11, "end LSN, not commit LSN"
    assert dict(batch.per_topic) == {"outbox.order": 1}
    assert batch.first_commit_time_ms == 946_684_800_001


def test_batches_close_at_transaction_ends_by_size() -> None:
    publisher = FakePublisher()
    pipeline = make(publisher)
    big = [event(number) for number in range(BATCH_EVENTS + 5)]
    pipeline.feed([RELATION, *transaction(10, event(0)), *transaction(20, *big), *transaction(30, event(1))])
    publisher.deliver(BATCH_EVENTS + 6)
    (batch,) = pipeline.watermark.advance()
    assert (batch.events, batch.per_topic) == (BATCH_EVENTS + 6, {"outbox.order": BATCH_EVENTS + 6})
    assert pipeline.watermark.settled_lsn == 21


def test_a_batch_closes_where_a_read_ends_even_if_its_events_were_acknowledged_meanwhile() -> None:
    publisher = FakePublisher()
    pipeline = make(publisher)
    pipeline.feed([RELATION, frames.begin(10, time_us=1000), event(1)])
    publisher.deliver()
    assert list(pipeline.watermark.advance()) == [], "the transaction is open"
    pipeline.feed([frames.commit(10, 11)])
    (batch,) = pipeline.watermark.advance()
    assert (batch.events, pipeline.watermark.settled_lsn) == (1, 11)


def test_acknowledgements_inside_a_long_transaction_are_seen() -> None:
    publisher = FakePublisher()
    pipeline = make(publisher)
    pipeline.feed([RELATION, *transaction(10, event(1)), frames.begin(20, time_us=1000), event(2), event(3)])
    assert (pipeline.acknowledged_events, pipeline.watermark.outstanding) == (0, 3)
    publisher.deliver(2)
    assert (pipeline.acknowledged_events, pipeline.watermark.outstanding) == (2, 1)
    publisher.deliver()
    pipeline.feed([frames.commit(20, 21)])
    list(pipeline.watermark.advance())
    assert (pipeline.acknowledged_events, pipeline.watermark.outstanding) == (3, 0)


def test_back_pressure_waits_and_loses_nothing() -> None:
    publisher = FakePublisher(room=2)
    waits = []

    def wait_for_room() -> bool:
        waits.append(len(publisher.taken))
        if len(waits) % 2 == 0:  # the first time there is still none
            publisher.room += 2
        return True

    pipeline = make(publisher, wait_for_room)
    pipeline.feed([RELATION, *transaction(10, *map(event, range(6)))])
    assert [record[7][0][1] for record in publisher.taken] == [b"e%d" % number for number in range(6)]
    assert waits == [2, 2, 4, 4]
    publisher.deliver(5)
    assert list(pipeline.watermark.advance()) == []
    publisher.deliver()
    assert [batch.events for batch in pipeline.watermark.advance()] == [6]


def test_draining_stops_at_the_transaction_end_and_leaves_the_rest_unread() -> None:
    publisher = FakePublisher()
    pipeline = make(publisher)
    stream = iter([*transaction(10, event(1), event(2)), *transaction(20, event(3))])
    pipeline.feed([RELATION, next(stream), next(stream)])
    pipeline.draining = True
    assert pipeline.in_transaction
    pipeline.feed(stream)
    assert not pipeline.in_transaction
    assert len(publisher.taken) == 2
    assert next(stream) == frames.begin(20, time_us=1000)
    publisher.deliver()
    list(pipeline.watermark.advance())
    assert pipeline.watermark.settled_lsn == 11, "what was read can be confirmed"


def test_keepalives() -> None:
    pipeline = make(FakePublisher())
    pipeline.feed([frames.keepalive(5)])
    assert (pipeline.wal_end, pipeline.reply_requested) == (5, False)
    pipeline.feed([frames.keepalive(9, reply=True), frames.keepalive(10)])
    assert (pipeline.wal_end, pipeline.reply_requested) == (10, True)


def test_rows_of_other_tables_and_other_changes_are_no_events() -> None:
    publisher = FakePublisher()
    other = frames.relation(8, "other", {"x": 23})
    noise = [frames.xlog_data(tag + b"anything") for tag in (b"O", b"Y", b"M", b"U", b"D", b"T")]
    pipeline = make(publisher)
    pipeline.feed([other, *transaction(10, frames.insert(8, [b"1"]), *noise)])
    assert publisher.taken == []


def test_a_changed_table_gets_a_new_plan() -> None:
    publisher = FakePublisher()
    pipeline = make(publisher)
    wider = frames.relation(7, "outbox", {"extra": 25, **OUTBOX})
    row = frames.insert(7, [b"x", b"e2", b"order", b"a", b"t", b"{}"])
    pipeline.feed([RELATION, *transaction(10, event(1)), wider, *transaction(20, row)])
    assert [record[7][0] for record in publisher.taken] == [("id", b"e1"), ("id", b"e2")]


def test_a_changed_table_of_the_same_shape_gets_a_new_plan() -> None:
    publisher = FakePublisher()
    pipeline = make(publisher)
    swapped = frames.relation(7, "outbox", {"aggregate_type": 25, "id": 25, **dict(list(OUTBOX.items())[2:])})
    row = frames.insert(7, [b"or", b"e2der", b"a", b"t", b"{}"])
    pipeline.feed([RELATION, *transaction(10, event(1)), swapped, *transaction(20, row)])
    assert [(record[0], record[7][0]) for record in publisher.taken] == [
        ("outbox.order", ("id", b"e1")),
        ("outbox.or", ("id", b"e2der")),
    ]


def test_rows_of_one_length_may_be_laid_out_differently() -> None:
    publisher = FakePublisher()
    rows: list[list[bytes | None]] = [
        [b"e1", b"order", b"a", b"t", b"{}"],
        [b"e", b"orders", b"aa", b"", b"{}"],
        [b"e3", b"other", b"b", b"t", b"12"],
    ]
    make(publisher).feed([RELATION, *transaction(10, *(frames.insert(7, row) for row in rows))])
    assert [(record[0], record[1], record[2]) for record in publisher.taken] == [
        ("outbox.order", b"{}", b"a"),
        ("outbox.orders", b"{}", b"aa"),
        ("outbox.other", b"12", b"b"),
    ]


@pytest.mark.parametrize(
    "stream",
    [
        [event(1)],
        [frames.begin(10), event(1)],
        [RELATION, event(1)],
        [RELATION, frames.begin(10), frames.insert(7, [b"1"])],
        [frames.begin(10), frames.begin(20)],
        [frames.commit(10, 11)],
        [frames.begin(10), frames.commit(9, 11)],
        [frames.xlog_data(b"S")],
        [frames.xlog_data(b"")],
        [b""],
        [b"z"],
    ],
    ids=[
        "insert first", "insert unannounced", "insert outside", "insert with fewer columns", "begin twice",
        "commit alone", "commit of another", "streaming", "empty message", "empty frame", "unknown frame",
    ],
)  # fmt: skip
def test_a_stream_that_breaks_the_protocol_is_refused(stream: list[bytes]) -> None:
    publisher = FakePublisher()
    with pytest.raises(MalformedStream):
        make(publisher).feed(stream)
    assert publisher.taken == []


def test_an_event_between_transactions_is_refused_though_its_like_was_seen() -> None:
    publisher = FakePublisher()
    with pytest.raises(MalformedStream):
        make(publisher).feed([RELATION, *transaction(10, event(1)), event(2)])
    assert len(publisher.taken) == 1


@given(st.lists(st.binary(max_size=60) | st.binary(max_size=60).map(frames.xlog_data), max_size=5))
def test_arbitrary_frames_give_the_one_error_or_nothing(stream: list[bytes]) -> None:
    pipeline = make(FakePublisher())
    pipeline.feed([RELATION])
    try:
        pipeline.feed(stream)
    except CdcOutboxError:
        return


def test_poison_and_refusals_are_located() -> None:
    publisher = FakePublisher()
    pipeline = make(publisher)
    pipeline.feed([RELATION, frames.begin(0x10), event(1)])
    with pytest.raises(PoisonEvent, match=r"event e .*NULL \(event 2 of the transaction that commits at 0/10\)"):
        pipeline.feed([frames.insert(7, [b"e", b"order", None, b"t", b"{}"])])
    publisher.refuse = True
    pipeline = make(publisher)
    with pytest.raises(PoisonEvent, match=r"event e1 .*refused by outbox.order: Refused\(\) \(event 1 of"):
        pipeline.feed([RELATION, frames.begin(0x10), event(1)])


def test_what_is_put_away_is_settled_and_the_rest_flows() -> None:
    publisher, dead_letters = FakePublisher(), FakeDeadLetters()
    pipeline = make(publisher, dead_letters=dead_letters)
    null_key = frames.insert(7, [b"e2", b"order", None, b"t", b"{}"])
    no_topic = frames.insert(7, [b"e3", b"a b", b"a", b"t", b"{}"])
    cut_short = event(4)[:-1]
    pipeline.feed([RELATION, *transaction(10, event(1), null_key, no_topic, cut_short, event(5))])
    assert [record[7][0][1] for record in publisher.taken] == [b"e1", b"e5"]
    assert [(letter.commit_lsn, letter.ordinal, letter.poison.reason) for letter in dead_letters.kept] == [
        (10, 2, "aggregate_id_null"),
        (10, 3, "topic_not_allowed"),
        (10, 4, "undecodable"),
    ]
    known, routed, unread = (letter.event for letter in dead_letters.kept)
    assert (known.event_id, known.aggregate_id, known.topic, known.payload) == ("e2", None, "outbox.order", b"{}")
    assert (routed.aggregate_type, routed.event_type, routed.topic) == ("a b", "t", "outbox.a b")
    assert (unread.event_id, unread.payload) == (None, cut_short[25:])
    publisher.deliver()
    assert [batch.per_topic for batch in pipeline.watermark.advance()] == [{"outbox.order": 2}]
    assert pipeline.watermark.settled_lsn == 11


def test_what_the_client_refuses_is_put_away() -> None:
    publisher, dead_letters = FakePublisher(), FakeDeadLetters()
    pipeline = make(publisher, dead_letters=dead_letters)
    pipeline.feed([RELATION, frames.begin(10)])
    publisher.refuse = True
    pipeline.feed([event(1)])
    publisher.refuse = False
    pipeline.feed([event(2), frames.commit(10, 11)])
    assert [letter.event.event_id for letter in dead_letters.kept] == ["e1"]
    assert pipeline.watermark.outstanding == 1
    publisher.deliver()
    (batch,) = pipeline.watermark.advance()
    assert +Counter(batch.per_topic) == {"outbox.order": 1}


def test_a_payload_that_is_no_bytea_is_put_away_as_it_came() -> None:
    publisher, dead_letters = FakePublisher(), FakeDeadLetters()
    row = frames.insert(7, [b"e1", b"order", b"a", b"t", b"\\xzz"])
    relation = frames.relation(7, "outbox", {**OUTBOX, "payload": 17})
    make(publisher, dead_letters=dead_letters).feed([relation, *transaction(10, row)])
    (letter,) = dead_letters.kept
    assert (letter.poison.reason, letter.event.payload) == ("undecodable", row[25:])


def test_what_was_put_away_before_is_passed_over() -> None:
    publisher, dead_letters = FakePublisher(), FakeDeadLetters()
    dead_letters.settled = {20: frozenset({2})}
    pipeline = make(publisher, dead_letters=dead_letters)
    events = [event(number) for number in (1, 2, 3)]
    pipeline.feed([RELATION, *transaction(10, *events), *transaction(20, *events), *transaction(30, *events)])
    assert [record[7][0][1] for record in publisher.taken] == [b"e1", b"e2", b"e3", b"e1", b"e3", b"e1", b"e2", b"e3"]
    assert dead_letters.kept == []


def test_a_redrive_is_published_in_its_place() -> None:
    publisher, dead_letters = FakePublisher(), FakeDeadLetters()
    pipeline = make(publisher, dead_letters=dead_letters)
    requests = frames.relation(9, "redrive_request", REQUEST, namespace="cdc_outbox")
    dead_letters.records[5] = Record("outbox.order", b"old", b"k", [("id", b"e0")])
    dead_letters.records[6] = Record("secret", b"old", b"k", [])
    first, second, third = (frames.insert(9, [b"1", b"s", number, None, None]) for number in (b"5", b"6", b"7"))
    pipeline.feed([RELATION, requests, *transaction(10, event(1), first, second, third, event(2))])
    assert [record[:3] for record in publisher.taken] == [
        ("outbox.order", b"{}", b"a"),
        ("outbox.order", b"old", b"k"),
        ("outbox.order", b"{}", b"a"),
    ]
    assert publisher.taken[1][7] == [("id", b"e0"), ("cdc-outbox-redriven", b"5")]
    assert dead_letters.refused == [(6, "topic_not_allowed")]
    assert list(pipeline.watermark.advance()) == []
    publisher.deliver()
    assert [batch.redriven for batch in pipeline.watermark.advance()] == [[(1, 5)]]


def test_a_redrive_that_can_never_fit_is_refused_and_counted_out() -> None:
    publisher, dead_letters = FakePublisher(), FakeDeadLetters()
    pipeline = make(publisher, wait_for_room=lambda: False, dead_letters=dead_letters)
    requests = frames.relation(9, "redrive_request", REQUEST, namespace="cdc_outbox")
    dead_letters.records[5] = Record("outbox.order", b"x" * 100, b"k", [])
    pipeline.feed([RELATION, requests, frames.begin(10)])
    publisher.room = 0
    pipeline.feed([frames.insert(9, [b"1", b"s", b"5", None, None])])
    publisher.room = 10
    pipeline.feed([event(1), frames.commit(10, 11)])
    publisher.deliver()
    assert dead_letters.refused == [(5, "queue_too_small")]
    assert [batch.redriven for batch in pipeline.watermark.advance()] == [[]]
    assert pipeline.watermark.settled_lsn == 11


def test_an_event_that_can_never_fit_is_put_away() -> None:
    publisher, dead_letters = FakePublisher(room=0), FakeDeadLetters()
    pipeline = make(publisher, wait_for_room=lambda: False, dead_letters=dead_letters)
    pipeline.feed([RELATION, *transaction(10, event(1))])
    assert [letter.poison.reason for letter in dead_letters.kept] == ["queue_too_small"]
    list(pipeline.watermark.advance())
    assert pipeline.watermark.settled_lsn == 11


@pytest.mark.parametrize("row", [event(1), frames.insert(9, [b"1", b"s", b"5", None, None])], ids=["event", "redrive"])
def test_what_is_raised_while_waiting_for_room_blames_nobody(row: bytes) -> None:
    """It is about another event: one that is in flight."""
    publisher, dead_letters = FakePublisher(), FakeDeadLetters()

    def refuse() -> bool:
        raise PoisonEvent("another one", reason="another")

    pipeline = make(publisher, wait_for_room=refuse, dead_letters=dead_letters)
    dead_letters.records[5] = Record("outbox.order", b"x", b"k", [])
    requests = frames.relation(9, "redrive_request", REQUEST, namespace="cdc_outbox")
    pipeline.feed([RELATION, requests, frames.begin(10)])
    publisher.room = 0
    with pytest.raises(PoisonEvent, match="another one"):
        pipeline.feed([row])
    assert (dead_letters.kept, dead_letters.refused) == ([], [])


def test_what_is_owed_is_recorded_before_the_watermark_moves() -> None:
    publisher = FakePublisher()
    pipeline = make(publisher)
    pipeline.feed([RELATION, *transaction(10, event(1))])
    publisher.deliver()
    for _ in pipeline.watermark.advance():
        assert pipeline.watermark.settled_lsn == 0
        break  # recording it has failed
    assert pipeline.watermark.settled_lsn == 0
    assert len(list(pipeline.watermark.advance())) == 1
    assert pipeline.watermark.settled_lsn == 11


def test_a_row_that_nobody_routes_stops_the_stream_where_its_table_is_listed() -> None:
    stranger = frames.relation(8, "stranger", {"a": 23})
    row = frames.insert(8, [b"1"])
    make(FakePublisher(), strays=Strays(frozenset())).feed([RELATION, stranger, *transaction(10, row)])
    pipeline = make(FakePublisher(), strays=Strays(None))
    pipeline.feed([RELATION, stranger, *transaction(10)])
    with pytest.raises(OperatorNeeded, match=r"a row of table public\.stranger has come"):
        pipeline.feed(transaction(20, row))


def test_the_watermark_follows_any_chunking() -> None:
    stream = [RELATION, *transaction(10, event(1), event(2)), *transaction(20), *transaction(30, event(3))]
    for cut in range(len(stream)):
        publisher = FakePublisher()
        pipeline = make(publisher)
        pipeline.feed(stream[:cut])
        pipeline.feed(stream[cut:])
        publisher.deliver()
        list(pipeline.watermark.advance())
        assert pipeline.watermark.settled_lsn == 31
