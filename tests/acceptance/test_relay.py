"""The spine, from outside: rows in, records out."""

import json
import random
import time
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka import Message

from acceptance.conftest import StartRelay
from cdc_outbox.kafka.opening import partition_of
from support.waiting import wait_until
from support.world import PARTITIONS, World, headers_of, read_topic

AGGREGATES = 500
EVENTS = 100_000


def header(message: Message, name: str) -> str:
    (value,) = [value for key, value in headers_of(message) if key == name]
    assert value is not None
    return value


def text(value: Any) -> str:
    assert isinstance(value, bytes)
    return value.decode()


class Writer:
    """Writes transactions of mixed size; knows what was committed, per aggregate in commit order."""

    def __init__(self, world: World, aggregate_type: str) -> None:
        self._world = world
        self._type = aggregate_type
        self._random = random.Random(7)
        self.committed: defaultdict[str, list[str]] = defaultdict(list)
        self.payloads: dict[str, str] = {}
        self.rolled_back: set[str] = set()

    def write(self, events: int) -> None:
        written = 0
        while written < events:
            size = self._random.choice([1, 1, 2, 3, 10, 100, 1000, 3000])
            written += size
            with self._world.db.transaction(force_rollback=(doomed := self._random.random() < 0.1)):
                rows = self._insert(size)
                if self._random.random() < 0.3:
                    with self._world.db.transaction(force_rollback=True):  # a savepoint
                        self.rolled_back.update(event_id for event_id, *_ in self._insert(5))
                if self._random.random() < 0.3:
                    with self._world.db.transaction():  # a savepoint that is released
                        rows += self._insert(3)
            for event_id, aggregate, payload in rows:
                if doomed:
                    self.rolled_back.add(event_id)
                else:
                    self.committed[aggregate].append(event_id)
                    self.payloads[event_id] = payload

    def _insert(self, count: int) -> list[tuple[str, str, str]]:
        rows = []
        copy_rows = self._world.db.cursor()
        statement = "COPY outbox (id, aggregate_type, aggregate_id, event_type, payload) FROM STDIN"
        with copy_rows.copy(statement) as copy:
            for _ in range(count):
                event_id = str(uuid.UUID(int=self._random.getrandbits(128)))
                aggregate = f"aggregate-{self._random.randrange(AGGREGATES)}"
                payload = f'{{"n":   {self._random.random()}, "ü": "{"x" * self._random.randrange(200)}"}}'
                copy.write_row((event_id, self._type, aggregate, "tested", payload))
                rows.append((event_id, aggregate, payload))
        return rows


def test_every_committed_event_once_and_no_other(world: World, start_relay: StartRelay) -> None:
    """100,000 rows, mixed transactions, 500 aggregates, the defaults."""
    world.migrate()
    aggregate_type = world.create_topic()
    writer = Writer(world, aggregate_type)
    before_ms = int(time.time() * 1000)
    start_relay()
    writer.write(EVENTS)
    messages = world.read(aggregate_type, len(writer.payloads), timeout_seconds=90)
    after_ms = int(time.time() * 1000)

    ids = [header(message, "id") for message in messages]
    assert len(ids) == len(set(ids)), "each once"
    assert set(ids) == set(writer.payloads), "all that was committed"
    assert not set(ids) & writer.rolled_back, "nothing that was rolled back"
    seen = defaultdict(list)
    for message, event_id in zip(messages, ids, strict=True):
        aggregate = text(message.key())
        seen[aggregate].append(event_id)
        assert text(message.value()) == writer.payloads[event_id], "byte for byte"
        assert [name for name, _ in headers_of(message)] == ["id", "type"]
        assert header(message, "type") == "tested"
        assert message.partition() == partition_of(aggregate.encode(), PARTITIONS)
        assert before_ms <= message.timestamp()[1] <= after_ms
    assert seen == writer.committed, "in commit order, aggregate by aggregate"


def test_the_seed_statement(world: World, start_relay: StartRelay, kafka: str) -> None:
    world.migrate()
    start_relay(CDC_OUTBOX_KAFKA__CREATE_TOPICS="true")
    event_id = str(uuid.uuid4())
    with psycopg.RawCursor(world.db) as cursor:
        cursor.execute(
            "INSERT INTO outbox(id, aggregate_id, event_type, payload, created_at) "
            "VALUES ($1, $2, 'run.created', $3, now());",
            [event_id, "run-1", '{"run":  1}'],
        )
    world.wait_until_confirmed()
    (message,) = [m for m in read_topic(kafka, "outbox.event", 1) if header(m, "id") == event_id]
    assert (text(message.key()), text(message.value())) == ("run-1", '{"run":  1}')
    assert header(message, "type") == "run.created"


def test_the_timestamp_is_that_of_the_commit(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    start_relay()
    with world.db.transaction():
        world.insert(aggregate_type)
        world.db.execute("SELECT pg_sleep(0.4)")
        before_commit_ms = time.time() * 1000
        world.insert(aggregate_type, "a-2")
    after_commit_ms = time.time() * 1000
    stamps = {message.timestamp()[1] for message in world.read(aggregate_type, 2)}
    assert len(stamps) == 1
    assert before_commit_ms - 1 <= stamps.pop() <= after_commit_ms


def test_a_debezium_style_table_by_configuration_alone(world: World, start_relay: StartRelay) -> None:
    world.db.execute("CREATE SCHEMA app")
    world.db.execute(
        "CREATE TABLE app.outboxevent (id uuid PRIMARY KEY, aggregatetype varchar(255) NOT NULL,"
        " aggregateid varchar(255) NOT NULL, type varchar(255) NOT NULL, payload jsonb)"
    )
    world.migrate(table="app.outboxevent", publication="app_events", aggregate_id="aggregateid", event_type="type")
    aggregate_type = world.create_topic()
    start_relay(
        CDC_OUTBOX_OUTBOX__TABLE="app.outboxevent",
        CDC_OUTBOX_POSTGRES__PUBLICATION="app_events",
        CDC_OUTBOX_OUTBOX__COLUMNS__AGGREGATE_TYPE="aggregatetype",
        CDC_OUTBOX_OUTBOX__COLUMNS__AGGREGATE_ID="aggregateid",
        CDC_OUTBOX_OUTBOX__COLUMNS__EVENT_TYPE="type",
        CDC_OUTBOX_KAFKA__HEADERS="debezium",
    )
    event_id = str(uuid.uuid4())
    row = [event_id, aggregate_type, "o-1", "OrderPlaced", '{"b": 1,   "a": 2}']
    with world.db.transaction():
        world.db.execute("INSERT INTO app.outboxevent VALUES (%s, %s, %s, %s, %s)", row)
        world.db.execute("DELETE FROM app.outboxevent")
    (message,) = world.read(aggregate_type, 1)
    assert (text(message.key()), text(message.value())) == ("o-1", '{"a": 2, "b": 1}')
    assert headers_of(message) == [("id", event_id)]


@pytest.mark.parametrize(
    ("payload_type", "payload", "value"),
    [
        ("json", '{"a":   [1, "ü"]}', '{"a":   [1, "ü"]}'.encode()),
        ("jsonb", '{"a":   [1, "ü"]}', '{"a": [1, "ü"]}'.encode()),
        ("text", "plain\ttext ü\n", "plain\ttext ü\n".encode()),
        ("bytea", bytes(range(256)), bytes(range(256))),
        ("bytea", b"", b""),
        ("json", None, None),
    ],
)
def test_payloads_arrive_byte_for_byte(
    world: World, start_relay: StartRelay, payload_type: str, payload: Any, value: bytes | None
) -> None:
    world.migrate()
    world.db.execute(f"ALTER TABLE outbox ALTER payload TYPE {payload_type} USING NULL".encode())
    aggregate_type = world.create_topic()
    start_relay()
    world.insert(aggregate_type, payload=payload)
    (message,) = world.read(aggregate_type, 1)
    assert message.value() == value


def test_cloudevents_with_the_rows_own_headers(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    start_relay(CDC_OUTBOX_KAFKA__HEADERS="cloudevents")
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    event_id = world.insert(aggregate_type, "a-1", headers=json.dumps({"traceparent": traceparent}))
    (message,) = world.read(aggregate_type, 1)
    headers = dict(headers_of(message))
    assert str(headers.pop("ce_time")).endswith("+00:00")
    assert headers == {
        "ce_specversion": "1.0",
        "ce_id": event_id,
        "ce_source": f"/postgresql/{world.name}/public.outbox",
        "ce_type": "tested",
        "ce_subject": "a-1",
        "content-type": "application/json",
        "traceparent": traceparent,
    }


def test_a_column_added_while_it_streams(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    start_relay()
    first = world.insert(aggregate_type)
    world.db.execute("ALTER TABLE outbox ADD COLUMN tenant text DEFAULT 'x'")
    second = world.insert(aggregate_type, tenant="acme")
    assert [header(message, "id") for message in world.read(aggregate_type, 2)] == [first, second]


def test_a_partitioned_outbox(world: World, start_relay: StartRelay) -> None:
    world.db.execute(
        "CREATE TABLE parted (id uuid DEFAULT gen_random_uuid(), aggregate_type text, aggregate_id text,"
        " event_type text, payload json, day int) PARTITION BY RANGE (day)"
    )
    world.db.execute("CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (10)")
    world.migrate(table="parted", publication="parted")
    aggregate_type = world.create_topic()
    start_relay(CDC_OUTBOX_OUTBOX__TABLE="parted", CDC_OUTBOX_POSTGRES__PUBLICATION="parted")
    world.db.execute("INSERT INTO parted VALUES (DEFAULT, %s, 'a', 't', '{}', 1)", [aggregate_type])
    world.db.execute("CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM (10) TO (20)")
    world.db.execute("INSERT INTO parted VALUES (DEFAULT, %s, 'b', 't', '{}', 11)", [aggregate_type])
    assert sorted(text(message.key()) for message in world.read(aggregate_type, 2)) == ["a", "b"]


@pytest.mark.rest
def test_one_huge_transaction_in_bounded_memory(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    relay = start_relay()
    rows = 400_000
    world.db.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload)"
        " SELECT %s, 'a-' || n %% 1000, 't', json_build_object('n', n, 'x', repeat('x', 250))"
        " FROM generate_series(1, %s) n",
        [aggregate_type, rows],
    )
    world.wait_until_confirmed(timeout_seconds=90)
    status = Path(f"/proc/{relay.process.pid}/status").read_text().splitlines()
    (peak_kb,) = [int(line.split()[1]) for line in status if line.startswith("VmHWM")]
    assert peak_kb < 120_000
    assert relay.metric('cdc_outbox_events_published_total{topic="outbox.%s"}' % aggregate_type) == rows  # noqa: UP031


def test_an_idle_outbox_pins_no_wal(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    start_relay()
    world.db.execute("CREATE TABLE other AS SELECT repeat('x', 1000) FROM generate_series(1, 100000)")
    written = world.current_lsn()
    wait_until(lambda: world.confirmed_lsn() >= written, "the slot follows", timeout_seconds=20)


def test_from_start_to_the_first_acknowledged_event(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    world.insert(aggregate_type)
    end = world.current_lsn()
    started = time.monotonic()
    start_relay(wait=False)
    wait_until(lambda: world.confirmed_lsn() >= end, "the event is confirmed")
    assert time.monotonic() - started < 5, "about a second; this machine may be busy"
