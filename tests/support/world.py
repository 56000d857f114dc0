"""A world of its own for a test: a database, a slot, topics; and the relay's configuration for them."""

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import AlterConfigOpType, ConfigEntry, ConfigResource
from confluent_kafka.admin._resource import ResourceType
from confluent_kafka.cimpl import NewTopic
from psycopg import conninfo, sql

from cdc_outbox.config import ColumnsConfig
from cdc_outbox.operations import migrations
from cdc_outbox.postgres.connection import connect
from cdc_outbox.wal.lsn import LSN
from support.waiting import wait_until

PARTITIONS = 6


@dataclass
class World:
    name: str
    admin_dsn: str
    dsn: str
    bootstrap_servers: str
    db: psycopg.Connection[tuple[Any, ...]]
    #: on top of what `environment` says
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def slot(self) -> str:
        return self.name

    @property
    def environment(self) -> dict[str, str]:
        return {
            "CDC_OUTBOX_POSTGRES__DSN": self.dsn,
            "CDC_OUTBOX_POSTGRES__SLOT": self.slot,
            "CDC_OUTBOX_KAFKA__BOOTSTRAP_SERVERS": self.bootstrap_servers,
            "CDC_OUTBOX_HTTP__LISTEN": "",
            **self.settings,
        }

    def migrate(self, *, table: str = "public.outbox", publication: str = "cdc_outbox", **columns: str) -> None:
        with connect(self.dsn) as connection:
            target = migrations.Target(table, publication, self.slot, ColumnsConfig(**columns))
            migrations.up(connection, target, failover=False, report=lambda _: None)

    def create_topic(self, name: str = "", *, partitions: int = PARTITIONS) -> str:
        """A topic ``outbox.<type>`` with a type of this world's own; returns the type, for ``aggregate_type``."""
        aggregate_type = f"{self.name}_{name or 'event'}"
        create_topic(self.bootstrap_servers, f"outbox.{aggregate_type}", partitions=partitions)
        return aggregate_type

    def insert(self, aggregate_type: str, aggregate_id: str = "a-1", payload: str | None = "{}", **more: Any) -> str:
        """One committed event; returns its id."""
        event_id = str(more.pop("id", uuid.uuid4()))
        row = {"id": event_id, "aggregate_type": aggregate_type, "aggregate_id": aggregate_id, "event_type": "tested"}
        insert(self.db, "outbox", {**row, "payload": payload, **more})
        return event_id

    def confirmed_lsn(self) -> LSN:
        row = self.db.execute(
            "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s", [self.slot]
        ).fetchone()
        assert row
        return LSN.parse(row[0])

    def current_lsn(self) -> LSN:
        row = self.db.execute("SELECT pg_current_wal_lsn()::text").fetchone()
        assert row
        return LSN.parse(row[0])

    def wait_until_confirmed(self, *, timeout_seconds: float = 30) -> None:
        """Until everything that is committed now is confirmed."""
        end = self.current_lsn()
        wait_until(lambda: self.confirmed_lsn() >= end, f"slot confirms {end}", timeout_seconds=timeout_seconds)

    def read(self, aggregate_type: str, count: int, *, timeout_seconds: float = 30) -> list[Message]:
        """The first ``count`` records of the type's topic, and whatever came with them, by partition and offset."""
        return read_topic(self.bootstrap_servers, f"outbox.{aggregate_type}", count, timeout_seconds=timeout_seconds)


@contextmanager
def make_world(admin_dsn: str, bootstrap_servers: str, *, encoding: str = "UTF8") -> Iterator[World]:
    name = f"t{uuid.uuid4().hex[:12]}"
    dsn = conninfo.make_conninfo(admin_dsn, dbname=name)
    with connect(admin_dsn) as admin:
        create = "CREATE DATABASE {} ENCODING {} TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
        admin.execute(sql.SQL(create).format(sql.Identifier(name), encoding))
    world = World(
        name, admin_dsn, dsn, bootstrap_servers, psycopg.connect(dsn, autocommit=True, client_encoding="UTF8")
    )
    try:
        yield world
    finally:
        world.db.close()
        with connect(admin_dsn) as admin:  # the test may have stopped the server meanwhile
            drop_database(admin, name)


def drop_database(admin: psycopg.Connection[Any], name: str) -> None:
    """With its slots, whoever holds them."""

    def slots_are_gone() -> bool:
        rows = admin.execute(
            "SELECT slot_name, pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE database = %s", [name]
        ).fetchall()
        for slot, _ in rows:
            try:
                admin.execute("SELECT pg_drop_replication_slot(%s)", [slot])
            except (psycopg.errors.ObjectInUse, psycopg.errors.UndefinedObject):
                return False
        return not rows

    wait_until(slots_are_gone, f"the slots of {name} are dropped")
    admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def insert(db: psycopg.Connection[Any], table: str, row: Mapping[str, Any]) -> None:
    statement = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
        sql.SQL(table),
        sql.SQL(", ").join(map(sql.Identifier, row)),
        sql.SQL(", ").join(sql.Placeholder() * len(row)),
    )
    db.execute(statement, list(row.values()))


def headers_of(message: Message) -> list[tuple[str, str | None]]:
    pairs: list[tuple[str, Any]] = list(message.headers() or [])  # type: ignore[arg-type] # never a dict on receipt
    return [(name, None if value is None else value.decode()) for name, value in pairs]


def create_topic(bootstrap_servers: str, topic: str, *, partitions: int = PARTITIONS, **config: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    admin.create_topics([NewTopic(topic, partitions, 1, config=config)])[topic].result()


def alter_topic(bootstrap_servers: str, topic: str, key: str, value: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    entry = ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    admin.incremental_alter_configs([resource])[resource].result()


def read_topic(bootstrap_servers: str, topic: str, count: int, *, timeout_seconds: float = 30) -> list[Message]:
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "reader",
            "enable.auto.commit": False,
            # a partition's leader of a moment ago may not have offset 0 yet; the default then is the end
            "auto.offset.reset": "earliest",
        }
    )
    partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions

    def ends() -> dict[int, int]:
        try:
            asked = {n: consumer.get_watermark_offsets(TopicPartition(topic, n), timeout=10) for n in partitions}
        except KafkaException:  # no leader yet, of a partition that was made a moment ago
            return {}
        return {number: end if end > first else 0 for number, (first, end) in asked.items()}

    # what is there now is read: the first answer of a broker that has just started may take a while
    left = {number: end for number, end in wait_until(ends, f"the ends of {topic}").items() if end}
    consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in partitions])
    messages: list[Message] = []

    def enough() -> bool:
        for message in consumer.consume(10_000, timeout=0.3):
            if message.error():
                continue
            messages.append(message)
            number, offset = message.partition(), message.offset()
            if number in left and offset is not None and offset + 1 >= left[number]:
                del left[number]
        return len(messages) >= count and not left

    try:
        wait_until(enough, f"{count} records in {topic}", timeout_seconds=timeout_seconds)
        enough()  # and what came too much
    finally:
        consumer.close()
    return sorted(messages, key=lambda message: (message.partition() or 0, message.offset() or 0))
