"""A lane: database, slot and topic of one run, its backlog, and what a consumer finds in the topic afterwards."""

import re
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from psycopg import conninfo

from benchmarks.arena import Arena
from cdc_outbox.operations import migrations
from cdc_outbox.postgres.connection import connect
from cdc_outbox.wal.lsn import LSN

PARTITIONS: Final = 6
_NUMBER: Final = re.compile(rb'number\\?"\s*:\s*(\d+)')
_READ_SECONDS: Final = 120.0
#: What stands in a payload between its number and the x's that fill it up: an order, or less where that does not fit.
_ORDER: Final = (
    ', "customer": "c-0000012345", "total": 1234.56, "currency": "EUR", "lines": [{"sku": "ABC-0001-XYZ", "qty": 2,'
    ' "price": 617.28}], "ship_to": {"name": "Jane Q. Public", "street": "1 Long Street Name", "city": "Springfield",'
    ' "zip": "12345", "country": "US"}, "note": "'
)
_LESS: Final = ', "note": "'
#: Bytes around it: brace, name, six digits, brace.
_AROUND: Final = 19


@dataclass(frozen=True, slots=True)
class Backlog:
    """Events to be written before the clock starts."""

    events: int
    per_transaction: int
    aggregates: int = 50_000
    payload_bytes: int = 310
    payload_type: str = "json"


@dataclass(frozen=True, slots=True)
class Found:
    """What a consumer read, to the end of the topic. Moments are the broker's clock, Unix seconds."""

    events: int
    missing: int
    out_of_order: int
    duplicates: int
    first_at: float
    last_at: float

    @property
    def is_complete(self) -> bool:
        return not self.missing and not self.out_of_order


@dataclass(slots=True)
class Lane:
    arena: Arena
    name: str
    dsn: str
    db: psycopg.Connection[Any]
    #: asks for the topic's ends
    counter: Consumer
    #: of the WAL, when the backlog was written
    end: LSN | None = None

    @property
    def slot(self) -> str:
        return self.name

    @property
    def topic(self) -> str:
        return f"outbox.{self.name}"

    def write(self, backlog: Backlog) -> None:
        """By the server itself."""
        self.db.execute(f"ALTER TABLE outbox ALTER payload TYPE {backlog.payload_type}".encode())
        middle = _ORDER if len(_ORDER) + _AROUND <= backlog.payload_bytes else _LESS
        middle += "x" * (backlog.payload_bytes - len(middle) - _AROUND)
        self.db.execute(
            f"""
            DO $$ DECLARE i int := 0; BEGIN WHILE i < {backlog.events} LOOP
                INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload)
                SELECT '{self.name}',
                       lpad(to_hex((i + j) % {backlog.aggregates}), 8, '0') || '-7c1b-4f6e-9a55-3b1f0e8d2c11',
                       'OrderPlaced',
                       ('{{"number": ' || (i + j) || '{middle}"}}')::{backlog.payload_type}
                  FROM generate_series(0, {backlog.per_transaction - 1}) j;
                COMMIT; i := i + {backlog.per_transaction};
            END LOOP; END $$
            """.encode()
        )
        self.end = self.wal_end()

    def wal_end(self) -> LSN:
        row = self.db.execute("SELECT pg_current_wal_lsn()::text").fetchone()
        assert row
        return LSN.parse(row[0])

    def walsender_pid(self) -> int | None:
        row = self.db.execute(
            "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", [self.slot]
        ).fetchone()
        return row[0] if row else None

    def is_confirmed(self) -> bool:
        """Up to the end of the backlog."""
        row = self.db.execute(
            "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s",
            [str(self.end), self.slot],
        ).fetchone()
        return row == (True,)

    def arrived(self) -> int:
        """Records in the topic, by its ends; 0 while it is so new that it has no leaders."""
        places = [TopicPartition(self.topic, number) for number in range(PARTITIONS)]
        try:
            return sum(self.counter.get_watermark_offsets(place, timeout=10)[1] for place in places)
        except KafkaException:
            return 0

    def read(self, events: int) -> Found:
        """All of the topic. Events carry numbers from 0; those of a key must first appear in rising order."""
        consumer = Consumer(
            {
                "bootstrap.servers": self.arena.bootstrap_servers,
                "group.id": "reader",
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",  # of a new topic a broker says at first that offset 0 is out of range
            }
        )
        consumer.assign([TopicPartition(self.topic, number, 0) for number in range(PARTITIONS)])
        seen: set[int] = set()
        latest: defaultdict[Any, int] = defaultdict(lambda: -1)
        out_of_order = duplicates = 0
        first_at, last_at = float("inf"), 0.0
        deadline = time.monotonic() + _READ_SECONDS
        while not (left := self.arrived()) and time.monotonic() < deadline:
            time.sleep(0.1)
        try:
            while left > 0 and time.monotonic() < deadline:
                for message in consumer.consume(min(left, 10_000), timeout=1):
                    if message.error():
                        raise KafkaException(message.error())
                    left -= 1
                    match = _NUMBER.search(message.value() or b"")
                    assert match, "a record without a number"
                    number, key, at = int(match[1]), message.key(), message.timestamp()[1] / 1000
                    first_at, last_at = min(first_at, at), max(last_at, at)
                    if number in seen:
                        duplicates += 1
                        continue
                    seen.add(number)
                    out_of_order += number < latest[key]
                    latest[key] = max(latest[key], number)
        finally:
            consumer.close()
        return Found(len(seen), events - len(seen), out_of_order, duplicates, first_at, last_at)


@contextmanager
def open_lane(arena: Arena) -> Iterator[Lane]:
    """Installed as `migrate up` does; the topic carries the broker's clock."""
    name = f"b{uuid.uuid4().hex[:10]}"
    dsn = conninfo.make_conninfo(arena.admin_dsn, dbname=name)
    kafka = AdminClient({"bootstrap.servers": arena.bootstrap_servers})
    with connect(arena.admin_dsn) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
        try:
            with connect(dsn) as connection:
                target = migrations.Target("public.outbox", "cdc_outbox", name)
                migrations.up(connection, target, failover=False, report=lambda _: None)
            config = {"message.timestamp.type": "LogAppendTime"}
            topic = f"outbox.{name}"
            kafka.create_topics([NewTopic(topic, PARTITIONS, 1, config=config)])[topic].result()
            counter = Consumer({"bootstrap.servers": arena.bootstrap_servers, "group.id": "counter"})
            try:
                with psycopg.connect(dsn, autocommit=True) as db:
                    yield Lane(arena, name, dsn, db, counter)
            finally:
                counter.close()
            kafka.delete_topics([topic])[topic].result()
        finally:
            _drop(admin, name)


def _drop(admin: psycopg.Connection[Any], name: str) -> None:
    deadline = time.monotonic() + 10
    query = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE database = %s AND active"
    while admin.execute(query, [name]).rowcount and time.monotonic() < deadline:
        time.sleep(0.05)
    admin.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s", [name])
    admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
