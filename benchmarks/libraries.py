"""The libraries for applications: what `emit`, `once` and `consume` add, beside the same loop without them.

One connection, psycopg 3, the application's own statement for each message; with and without take turns, round by
round, so that what the machine does meanwhile falls on both. No relay, and Kafka for `consume` only.
"""

import json
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import psycopg
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from psycopg import conninfo

from benchmarks.arena import Arena
from benchmarks.drain import Incomplete
from cdc_outbox.demo.sandbox import own_database
from cdc_outbox.inbox import schema as inbox_schema
from cdc_outbox.inbox.confluent import consume
from cdc_outbox.inbox.psycopg import Inbox, Message
from cdc_outbox.outbox import schema as outbox_schema
from cdc_outbox.outbox import uuid7
from cdc_outbox.outbox.psycopg import Event, Outbox

_ROUNDS: Final = 9
_PAYLOAD: Final = {"amount": 620, "currency": "EUR", "text": "x" * 250}
_CHANGE: Final = "INSERT INTO account (id, balance) VALUES (%s, 1)"

Connection = psycopg.Connection[Any]
#: Handles so many messages in one transaction.
Work = Callable[[Connection, int], None]


@dataclass(frozen=True, slots=True)
class Overhead:
    """Medians, microseconds per message. What is added is the median of the rounds' own differences."""

    what: str
    messages_per_transaction: int
    without_us: float
    with_us: float
    added_us: float


def measure_emit(arena: Arena, messages: int) -> list[Overhead]:
    outbox = Outbox()

    def emit(connection: Connection, count: int) -> None:
        change(connection, count)
        outbox.emit_many(connection, [Event("refund.made", str(uuid.uuid4()), _PAYLOAD) for _ in range(count)])

    with _database(arena, outbox_schema.sql()) as connection:
        return [_compare(connection, "emit", change, emit, per, messages) for per in (1, 100)]


def measure_inbox(arena: Arena, messages: int) -> list[Overhead]:
    inbox, now = Inbox("billing"), datetime.now(UTC)
    handled = [Message(str(uuid7()), now) for _ in range(100)]

    def nothing(_connection: Connection, _count: int) -> None:
        """As for what was handled already."""

    def once(connection: Connection, count: int) -> None:
        change(connection, len(inbox.once_many(connection, [Message(str(uuid7()), now) for _ in range(count)])))

    def duplicate(connection: Connection, count: int) -> None:
        assert not inbox.once_many(connection, handled[:count])

    with _database(arena, inbox_schema.sql()) as connection:
        with connection.transaction():
            inbox.once_many(connection, handled)
        return [
            _compare(connection, what, without, work, per, messages)
            for what, without, work in (("once", change, once), ("once, a duplicate", nothing, duplicate))
            for per in (1, 100)
        ]


@dataclass(frozen=True, slots=True)
class Rate:
    """Of `consume`, in batches of 100: median of the rounds."""

    what: str
    messages: int
    messages_per_second: float


class NoInbox(Inbox):
    """Takes everything for new, writes nothing down: the same loop, without."""

    def once(self, connection: Connection, message: Message) -> bool:
        return True

    def once_many(self, connection: Connection, messages: Iterable[Message]) -> list[Message]:
        return list(messages)

    def park_followers(self, connection: Connection, messages: Iterable[Message]) -> list[Message]:
        return list(messages)

    def due(self, connection: Connection, **more: Any) -> None:
        pass

    def count_attempt(self, connection: Connection, message: Message) -> int:
        return 1

    def forget_attempts(self, connection: Connection, messages: Iterable[Message]) -> None:
        pass


def measure_consume(arena: Arena, messages: int, rounds: int) -> list[Rate]:
    topic = f"consume_{uuid.uuid4().hex[:8]}"
    admin = AdminClient({"bootstrap.servers": arena.bootstrap_servers})
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result()
    producer = Producer({"bootstrap.servers": arena.bootstrap_servers, "linger.ms": 50})
    for number in range(messages):
        headers: dict[str, str | bytes | None] = {"id": str(uuid7()), "type": "refund.made"}
        producer.produce(topic, json.dumps(_PAYLOAD), f"a-{number % 1000}", headers=headers)
        producer.poll(0)
    producer.flush()
    inboxes = {"with the inbox": Inbox, "without": NoInbox}
    with _database(arena, inbox_schema.sql()) as connection:
        rates = [
            {what: _consume(arena, connection.info.dsn, topic, kind, messages) for what, kind in inboxes.items()}
            for _ in range(rounds)
        ]
    admin.delete_topics([topic])[topic].result()
    return [Rate(what, messages, statistics.median(each[what] for each in rates)) for what in inboxes]


def _consume(arena: Arena, dsn: str, topic: str, kind: type[Inbox], messages: int) -> float:
    """Messages a second, but for the first tenth: a partition's first are handled one by one."""
    group, stop, times = f"g_{uuid.uuid4().hex[:8]}", threading.Event(), []

    def handle(connection: Connection, _message: Message) -> None:
        connection.execute(_CHANGE, [uuid.uuid4()])
        times.append(time.perf_counter())
        if len(times) == messages:
            stop.set()

    consumer = Consumer(
        {
            "bootstrap.servers": arena.bootstrap_servers,
            "group.id": group,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    connect = lambda: psycopg.connect(dsn, password=conninfo.conninfo_to_dict(arena.admin_dsn).get("password"))  # noqa: E731
    patience = threading.Timer(arena.patience_seconds, stop.set)
    patience.start()
    consume(consumer, connect, handle, inbox=kind(group), topics=[topic], batch=100, stop=stop)
    patience.cancel()
    consumer.close()
    if len(times) < messages:
        raise Incomplete(f"consume: {len(times)} of {messages} messages after {arena.patience_seconds:.0f} s")
    first = messages // 10
    return (messages - first) / (times[-1] - times[first])


def change(connection: Connection, count: int) -> None:
    """The application's own."""
    for _ in range(count):
        connection.execute(_CHANGE, [uuid.uuid4()])


@contextmanager
def _database(arena: Arena, script: str) -> Iterator[Connection]:
    name = f"libraries_{uuid.uuid4().hex[:8]}"
    with own_database(arena.admin_dsn, name):
        dsn = conninfo.make_conninfo(arena.admin_dsn, dbname=name)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(script.encode())
            connection.execute("CREATE TABLE account (id uuid PRIMARY KEY, balance int)")
            yield connection


def _compare(connection: Connection, what: str, without: Work, with_it: Work, per: int, messages: int) -> Overhead:
    rounds = [tuple(_us(connection, work, per, messages) for work in (without, with_it)) for _ in range(_ROUNDS + 1)]
    return _overhead(what, per, rounds[1:])  # the first one warms up


def _overhead(what: str, per: int, rounds: Sequence[tuple[float, ...]]) -> Overhead:
    before, after = zip(*rounds, strict=True)
    added = statistics.median(with_it - without for without, with_it in rounds)
    return Overhead(what, per, statistics.median(before), statistics.median(after), added)


def _us(connection: Connection, work: Work, per: int, messages: int) -> float:
    """Per message."""
    transactions = max(1, messages // per)
    began = time.perf_counter()
    for _ in range(transactions):
        with connection.transaction():
            work(connection, per)
    return (time.perf_counter() - began) / (transactions * per) * 1e6
