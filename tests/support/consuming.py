"""A topic with messages, and the loop over them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import psycopg2
import sqlalchemy as sa
from confluent_kafka import Consumer, Producer, TopicPartition
from sqlalchemy.orm import Session

from cdc_outbox.inbox import Message, dbapi, sqlalchemy
from cdc_outbox.inbox import psycopg as inbox_psycopg
from cdc_outbox.inbox import schema as inbox_sql
from cdc_outbox.inbox.confluent import consume
from support.applications import url
from support.waiting import wait_until
from support.world import World, create_topic

Handler = Callable[[Any, Message], None]


INSERT = "INSERT INTO effect VALUES ('{}')"


@dataclass
class Topic:
    """One of this test's own, with its producer; and the effects of whoever consumes it."""

    world: World
    name: str
    producer: Producer
    seen: list[Message] = field(default_factory=list)
    consumer_class: type[Consumer] = Consumer

    def produce(self, *names: str, key: str | None = None, **more: Any) -> None:
        for name in names:
            fields = {"key": key or f"k-{name}", "value": b"{}", "headers": {"id": name}, "partition": 0, **more}
            self.producer.produce(self.name, **fields)
        assert self.producer.flush(10) == 0

    def consumer(self, member: str = "the-only-one") -> Consumer:
        return self.consumer_class(
            {
                "bootstrap.servers": self.world.bootstrap_servers,
                "group.id": self.name,
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 20,
                **({"group.instance.id": member} if member else {}),
            }
        )

    def handle(self, connection: psycopg.Connection[Any], message: Message) -> None:
        self.seen.append(message)
        connection.execute(INSERT.format(message.id).encode())

    def run(self, handler: Handler | None = None, **more: Any) -> None:
        """``consume`` until ``stop``, or it ends by itself."""
        consumer = self.consumer()
        options = {"inbox": inbox_psycopg.Inbox("billing"), "topics": [self.name], **more}
        connect = options.pop("connect", lambda: psycopg.connect(self.world.dsn))
        try:
            consume(consumer, connect, handler or self.handle, **options)
        finally:
            consumer.close()

    @contextmanager
    def running(self, handler: Handler | None = None, **more: Any) -> Iterator[list[BaseException]]:
        """In a thread; yields how it ended, if by itself."""
        stop, failures = threading.Event(), []

        def run() -> None:
            try:
                self.run(handler, stop=stop, **more)
            except BaseException as error:  # noqa: BLE001 - asked for by the test
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield failures
        finally:
            stop.set()
            thread.join(30)
        assert not thread.is_alive()

    def effects(self) -> list[str]:
        return [name for (name,) in self.world.db.execute("SELECT message_id FROM effect ORDER BY ctid").fetchall()]

    def wait_for(self, *names: str) -> None:
        wait_until(lambda: set(names) <= set(self.effects()), f"effects of {names}", timeout_seconds=30)

    def states(self) -> dict[str, str]:
        return dict(self.world.db.execute("SELECT message_id, state FROM inbox_parked ORDER BY place").fetchall())

    def committed_offset(self) -> int:
        consumer = self.consumer()
        (place,) = consumer.committed([TopicPartition(self.name, 0)], timeout=10)
        consumer.close()
        return int(place.offset)


def make_topic(world: World) -> Topic:
    name = f"outbox.{world.name}"
    create_topic(world.bootstrap_servers, name, partitions=2)
    world.db.execute(inbox_sql.sql().encode())
    world.db.execute("CREATE TABLE effect (message_id text PRIMARY KEY)")
    return Topic(world, name, Producer({"bootstrap.servers": world.bootstrap_servers, "linger.ms": 0}))


def by_psycopg(dsn: str) -> tuple[Any, Any, Any]:
    return lambda: psycopg.connect(dsn), inbox_psycopg.Inbox("billing"), lambda c, sql: c.execute(sql)


def by_psycopg2(dsn: str) -> tuple[Any, Any, Any]:
    return lambda: psycopg2.connect(dsn), dbapi.Inbox("billing"), lambda c, sql: c.cursor().execute(sql)


def by_sqlalchemy(dsn: str) -> tuple[Any, Any, Any]:
    engine = sa.create_engine(url(dsn, "postgresql+psycopg"), poolclass=sa.NullPool)
    return engine.connect, sqlalchemy.Inbox("billing"), lambda c, sql: c.execute(sa.text(sql))


def by_session(dsn: str) -> tuple[Any, Any, Any]:
    engine = sa.create_engine(url(dsn, "postgresql+psycopg2"), poolclass=sa.NullPool)
    return lambda: Session(engine), sqlalchemy.Inbox("billing"), lambda c, sql: c.execute(sa.text(sql))
