import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_outbox.errors import CdcOutboxError, MalformedStream, OperatorNeeded, PoisonEvent
from cdc_outbox.relay.pipeline import BATCH_EVENTS, Pipeline
from cdc_outbox.relay.router import Outbox, Record, Router, Routing, Strays
from cdc_outbox.relay.stops import Drained, Dry, Full, NewTopic, Parking, RedriveRefused, Requested, Stop
from cdc_outbox.relay.topic_template import TopicTemplate
from cdc_outbox.wal.position import Position
from support import frames

OUTBOX = {"id": 2950, "aggregate_type": 25, "aggregate_id": 25, "event_type": 25, "payload": 114}
RELATION = frames.relation(7, "outbox", OUTBOX)
REQUEST = {"id": 20, "slot": 25, "kind": 25, "parked_id": 20, "topic": 25, "key": 25}


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


class Driver:
    """Feeds a pipeline and does what it stops for, as the session does, without a world."""

    def __init__(
        self, publisher: FakePublisher, *, settled: Iterable[Position] = (), strays: Strays | None = None
    ) -> None:
        outbox, known = Outbox("public", "outbox", {name: (name,) for name in OUTBOX}), set[str]()
        router = Router(outbox, TopicTemplate("outbox.{aggregate_type}"), "plain", "", known)
        self.pipeline = Pipeline(Routing([router], strays or Strays(), known), publisher, settled)
        self.watermark = self.pipeline.watermark
        self.kept: list[Parking] = []
        self.refused: list[tuple[int, str]] = []
        #: dead letters that may be asked for
        self.records: dict[int, Record] = {}
        #: what to do for want of room
        self.make_room: Callable[[], object] = lambda: pytest.fail("no room")
        self.topics: list[str] = []

    def feed(self, frames: Iterable[bytes]) -> None:
        frames = iter(frames)
        while True:
            stop = self.pipeline.feed(frames)
            self.pipeline.close_batch()
            if isinstance(stop, Dry | Drained):
                return
            self.act_on(stop)

    def act_on(self, stop: Stop) -> None:
        match stop:
            case Full():
                self.make_room()
            case NewTopic(topic):
                self.topics.append(topic)
                self.pipeline.admit(topic)
            case Parking():
                self.kept.append(stop)
            case Requested(request):
                if record := self.records.get(request.dead_letter_id):
                    self.pipeline.redrive(request, record)
            case RedriveRefused(request, poison):
                self.refused.append((request.dead_letter_id, poison.reason))

    def no_room_will_come(self) -> None:
        self.act_on(self.pipeline.refuse(PoisonEvent("too large", reason="queue_too_small")))


def make(publisher: FakePublisher, strays: Strays | None = None, settled: Iterable[Position] = ()) -> Driver:
    return Driver(publisher, strays=strays, settled=settled)


def event(number: int) -> bytes:
    return frames.insert(7, [b"e%d" % number, b"order", b"a", b"t", b"{}"])


def redrive(number: int, dead_letter: int, topic: bytes | None = None) -> bytes:
    return frames.insert(9, [b"%d" % number, b"s", b"redrive", b"%d" % dead_letter, topic, None])


def transaction(commit_lsn: int, *events: bytes) -> list[bytes]:
    return [frames.begin(commit_lsn, time_us=1000), *events, frames.commit(commit_lsn, commit_lsn + 1)]


def test_one_event_walks_through() -> None:
    publisher = FakePublisher()
    driver = make(publisher)
    driver.feed([RELATION, *transaction(10, event(1))])
    (record,) = publisher.taken
    assert record[:4] == ("outbox.order", b"{}", b"a", -1)
    assert record[6:] == (946_684_800_001, [("id", b"e1"), ("type", b"t")])
    assert list(driver.watermark.advance()) == []
    publisher.deliver()
    (batch,) = driver.watermark.advance()
    assert driver.watermark.settled_lsn == 11, "end LSN, not commit LSN"
    assert dict(batch.per_topic) == {"outbox.order": 1}
    assert batch.first_commit_time_ms == 946_684_800_001


def test_batches_close_at_transaction_ends_by_size() -> None:
    publisher = FakePublisher()
    driver = make(publisher)
    big = [event(number) for number in range(BATCH_EVENTS + 5)]
    driver.feed([RELATION, *transaction(10, event(0)), *transaction(20, *big), *transaction(30, event(1))])
    publisher.deliver(BATCH_EVENTS + 6)
    (batch,) = driver.watermark.advance()
    assert (batch.events, batch.per_topic) == (BATCH_EVENTS + 6, {"outbox.order": BATCH_EVENTS + 6})
    assert driver.watermark.settled_lsn == 21


def test_a_batch_closes_where_a_read_ends_even_if_its_events_were_acknowledged_meanwhile() -> None:
    publisher = FakePublisher()
    driver = make(publisher)
    driver.feed([RELATION, frames.begin(10, time_us=1000), event(1)])
    publisher.deliver()
    assert list(driver.watermark.advance()) == [], "the transaction is open"
    driver.feed([frames.commit(10, 11)])
    (batch,) = driver.watermark.advance()
    assert (batch.events, driver.watermark.settled_lsn) == (1, 11)


def test_acknowledgements_inside_a_long_transaction_are_seen() -> None:
    publisher = FakePublisher()
    driver = make(publisher)
    driver.feed([RELATION, *transaction(10, event(1)), frames.begin(20, time_us=1000), event(2), event(3)])
    assert (driver.pipeline.acknowledged_events, driver.watermark.outstanding) == (0, 3)
    publisher.deliver(2)
    assert (driver.pipeline.acknowledged_events, driver.watermark.outstanding) == (2, 1)
    publisher.deliver()
    driver.feed([frames.commit(20, 21)])
    list(driver.watermark.advance())
    assert (driver.pipeline.acknowledged_events, driver.watermark.outstanding) == (3, 0)


def test_back_pressure_waits_and_loses_nothing() -> None:
    publisher = FakePublisher(room=2)
    driver, waits = make(publisher), []

    def make_room() -> None:
        waits.append(len(publisher.taken))
        assert driver.watermark.outstanding == len(publisher.taken), "what waits is counted nowhere"
        if len(waits) % 2 == 0:  # the first time there is still none
            publisher.room += 2

    driver.make_room = make_room
    driver.feed([RELATION, *transaction(10, *map(event, range(6)))])
    assert [record[7][0][1] for record in publisher.taken] == [b"e%d" % number for number in range(6)]
    assert waits == [2, 2, 4, 4]
    publisher.deliver(5)
    assert list(driver.watermark.advance()) == []
    publisher.deliver()
    assert [batch.events for batch in driver.watermark.advance()] == [6]


def test_draining_stops_at_the_transaction_end_and_leaves_the_rest_unread() -> None:
    publisher = FakePublisher()
    driver = make(publisher)
    stream = iter([*transaction(10, event(1), event(2)), *transaction(20, event(3))])
    driver.feed([RELATION, next(stream), next(stream)])
    driver.pipeline.draining = True
    assert driver.pipeline.in_transaction
    driver.feed(stream)
    assert not driver.pipeline.in_transaction
    assert len(publisher.taken) == 2
    assert next(stream) == frames.begin(20, time_us=1000)
    publisher.deliver()
    list(driver.watermark.advance())
    assert driver.watermark.settled_lsn == 11, "what was read can be confirmed"


def test_keepalives() -> None:
    driver = make(FakePublisher())
    driver.feed([frames.keepalive(5)])
    assert (driver.pipeline.wal_end, driver.pipeline.reply_requested) == (5, False)
    driver.feed([frames.keepalive(9, reply=True), frames.keepalive(10)])
    assert (driver.pipeline.wal_end, driver.pipeline.reply_requested) == (10, True)


def test_rows_of_other_tables_and_other_changes_are_no_events() -> None:
    publisher = FakePublisher()
    other = frames.relation(8, "other", {"x": 23})
    noise = [frames.xlog_data(tag + b"anything") for tag in (b"O", b"Y", b"M", b"U", b"D", b"T")]
    driver = make(publisher)
    driver.feed([other, *transaction(10, frames.insert(8, [b"1"]), *noise)])
    assert publisher.taken == []


def test_a_changed_table_gets_a_new_plan() -> None:
    publisher = FakePublisher()
    driver = make(publisher)
    wider = frames.relation(7, "outbox", {"extra": 25, **OUTBOX})
    row = frames.insert(7, [b"x", b"e2", b"order", b"a", b"t", b"{}"])
    driver.feed([RELATION, *transaction(10, event(1)), wider, *transaction(20, row)])
    assert [record[7][0] for record in publisher.taken] == [("id", b"e1"), ("id", b"e2")]


def test_a_changed_table_of_the_same_shape_gets_a_new_plan() -> None:
    publisher = FakePublisher()
    driver = make(publisher)
    swapped = frames.relation(7, "outbox", {"aggregate_type": 25, "id": 25, **dict(list(OUTBOX.items())[2:])})
    row = frames.insert(7, [b"or", b"e2der", b"a", b"t", b"{}"])
    driver.feed([RELATION, *transaction(10, event(1)), swapped, *transaction(20, row)])
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
    driver = make(FakePublisher())
    driver.feed([RELATION])
    try:
        driver.feed(stream)
    except CdcOutboxError:
        return


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


def test_an_ordinal_counts_every_insert_of_the_transaction() -> None:
    """So that a configuration which routes fewer tables, or more, gives the same events the same positions."""
    publisher, other = FakePublisher(), frames.relation(8, "other", {"x": 23})
    driver = make(publisher, settled=[Position(10, 4)])
    row = frames.insert(8, [b"1"])
    driver.feed([RELATION, other, *transaction(10, row, event(1), row, event(2), event(3))])
    assert [record[7][0][1] for record in publisher.taken] == [b"e1", b"e3"]
    assert driver.pipeline.reached == Position(10, 5)
    publisher.deliver()
    assert [batch.events for batch in driver.watermark.advance()] == [3], "of which one was settled before"


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


ROWS = st.sampled_from(
    [
        event(1),
        frames.insert(7, [b"e2", b"other", b"b", b"t", None]),
        frames.insert(7, [b"e3", b"order", None, b"t", b"{}"]),
        frames.insert(7, [b"e4", b"a b", b"a", b"t", b"{}"]),
        event(5)[:-1],
        frames.insert(8, [b"1"]),
        redrive(1, 5),
        redrive(2, 6, b"a b"),
        frames.keepalive(5),
    ]
)


@given(st.lists(st.lists(ROWS, max_size=6), max_size=4), st.integers(1, 3), st.sets(st.integers(1, 6), max_size=2))
def test_the_hot_loop_does_what_the_slow_path_does(
    transactions: list[list[bytes]], room: int, settled: set[int]
) -> None:
    """For any transactions, with a queue that is full after every ``room`` events."""
    outcomes = []
    for one_by_one in (False, True):
        publisher = FakePublisher(room=room)
        driver = make(publisher, settled=[Position(20, ordinal) for ordinal in settled])
        driver.make_room = lambda publisher=publisher: setattr(publisher, "room", room)  # type: ignore[misc]
        if one_by_one:
            driver.pipeline.publish_one_by_one()
        driver.records = {number: Record("outbox.order", b"x", b"k", []) for number in (5, 6)}
        others = [
            frames.relation(8, "other", {"x": 23}),
            frames.relation(9, "request", REQUEST, namespace="cdc_outbox"),
        ]
        driver.feed([RELATION, *others])
        for number, rows in enumerate(transactions, start=1):
            driver.feed(transaction(10 * number, *rows))
        taken = [(record[:4], record[6:]) for record in publisher.taken]
        outstanding = driver.watermark.outstanding
        publisher.deliver()
        batches = [(batch.events, batch.redriven) for batch in driver.watermark.advance()]
        outcomes.append((taken, outstanding, batches, driver.kept, driver.refused, driver.watermark.settled_lsn))
    assert str(outcomes[0]) == str(outcomes[1])
    taken, outstanding, *_ = outcomes[0]
    assert outstanding == len(taken)


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


def test_the_watermark_follows_any_chunking() -> None:
    stream = [RELATION, *transaction(10, event(1), event(2)), *transaction(20), *transaction(30, event(3))]
    for cut in range(len(stream)):
        publisher = FakePublisher()
        driver = make(publisher)
        driver.feed(stream[:cut])
        driver.feed(stream[cut:])
        publisher.deliver()
        list(driver.watermark.advance())
        assert driver.watermark.settled_lsn == 31
