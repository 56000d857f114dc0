"""The pipeline: what is published, counted, and passed over; whatever the frames and however they come."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_outbox.errors import CdcOutboxError, MalformedStream
from cdc_outbox.relay.pipeline import BATCH_EVENTS
from cdc_outbox.relay.router import Record
from cdc_outbox.wal.position import Position
from support import frames
from support.pipeline import OUTBOX, RELATION, REQUEST, FakePublisher, event, make, redrive, transaction


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
