"""A sandbox: a database, a slot and topics of its own, on whatever servers there are; all is removed at its end."""

import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from psycopg import conninfo, sql

from cdc_outbox.operations import migrations
from cdc_outbox.postgres.connection import connect


@dataclass(frozen=True, slots=True)
class Sandbox:
    """``name`` is that of its database and slot. On servers that were given it touches nothing but what is its own."""

    name: str
    dsn: str
    bootstrap_servers: str
    #: of the relay, on top of those that say where it is
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """The relay's configuration."""
        return {
            "CDC_OUTBOX_POSTGRES__DSN": self.dsn,
            "CDC_OUTBOX_POSTGRES__SLOT": self.name,
            "CDC_OUTBOX_KAFKA__BOOTSTRAP_SERVERS": self.bootstrap_servers,
            "CDC_OUTBOX_KAFKA__CREATE_TOPICS": "true",
            **self.settings,
        }


def unique_name(prefix: str) -> str:
    """For a sandbox that stands beside others on the same servers."""
    return f"{prefix}_{uuid.uuid4().hex[:8]}"


@contextmanager
def make_sandbox(dsn: str, bootstrap_servers: str, name: str, settings: Mapping[str, str]) -> Iterator[Sandbox]:
    """With an outbox in its database, which is gone afterwards; topics are not its business."""
    sandbox = Sandbox(name, conninfo.make_conninfo(dsn, dbname=name), bootstrap_servers, settings)
    with own_database(dsn, name):
        with connect(sandbox.dsn) as connection:
            target = migrations.Target("public.outbox", "cdc_outbox", name)
            migrations.up(connection, target, failover=False, report=lambda _: None)
        yield sandbox


@contextmanager
def own_database(dsn: str, name: str) -> Iterator[None]:
    """A database of one's own, with its slots gone when it ends."""
    database = sql.Identifier(name)
    with connect(dsn) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(database))
    try:
        yield
    except BaseException as error:
        # A connection that Ctrl-C interrupted in its making is held by the traceback, and its session waits for us, a
        # minute long. DROP DATABASE waits for every session of the server.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        with connect(dsn) as connection:
            connection.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s", [name]
            )
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(database))


@contextmanager
def own_topics(bootstrap_servers: str, prefix: str) -> Iterator[None]:
    """In the end every topic that has ``prefix`` in front is deleted."""
    admin = AdminClient({"bootstrap.servers": bootstrap_servers, "log_level": 0})
    try:
        yield
    finally:
        topics = [topic for topic in admin.list_topics(timeout=10).topics if topic.startswith(prefix)]
        for deleted in admin.delete_topics(topics).values() if topics else ():
            deleted.result()


@contextmanager
def own_group(bootstrap_servers: str, name: str) -> Iterator[None]:
    """In the end what a consumer group has committed is forgotten."""
    try:
        yield
    finally:
        admin = AdminClient({"bootstrap.servers": bootstrap_servers, "log_level": 0})
        with suppress(KafkaException):  # it has committed nothing yet
            admin.delete_consumer_groups([name])[name].result()
