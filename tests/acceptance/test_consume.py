"""The loop from outside: what it refuses, how it takes odd messages and stops; with every kind of connection."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import psycopg2
import pytest
import sqlalchemy as sa
from confluent_kafka import Consumer, DeserializingConsumer, KafkaError, KafkaException, Producer, TopicPartition
from sqlalchemy.orm import Session

from cdc_outbox.inbox import Message, NoTransaction, dbapi, sqlalchemy
from cdc_outbox.inbox import psycopg as inbox_psycopg
from cdc_outbox.inbox import schema as inbox_sql
from cdc_outbox.inbox.confluent import PoisonMessage, consume
from cdc_outbox.inbox.librdkafka import setting
from cdc_outbox.inbox.partitions import Partitions
from support.applications import django_connections, url
from support.waiting import wait_until
from support.world import World, create_topic, make_world

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


@pytest.fixture
def topic(world: World) -> Topic:
    return make_topic(world)


def make_topic(world: World) -> Topic:
    name = f"outbox.{world.name}"
    create_topic(world.bootstrap_servers, name, partitions=2)
    world.db.execute(inbox_sql.sql().encode())
    world.db.execute("CREATE TABLE effect (message_id text PRIMARY KEY)")
    return Topic(world, name, Producer({"bootstrap.servers": world.bootstrap_servers, "linger.ms": 0}))


def failing(topic: Topic, *names: str) -> Handler:
    def handle(connection: Any, message: Message) -> None:
        topic.handle(connection, message)
        if message.id in names:
            raise ValueError(f"{message.id} cannot be taken")

    return handle


class TestRefusals:
    @pytest.mark.parametrize("more", [{"enable.auto.commit": True}, {}])
    def test_automatic_commits(self, topic: Topic, more: dict[str, Any]) -> None:
        consumer = Consumer({"bootstrap.servers": topic.world.bootstrap_servers, "group.id": "g", **more})
        with pytest.raises(ValueError, match=r"enable\.auto\.commit is true: .* turn it off"):
            consume(consumer, lambda: pytest.fail("it connects"), topic.handle, inbox=inbox_psycopg.Inbox("billing"))
        consumer.close()

    def test_what_a_consumer_was_configured_with(self) -> None:
        class Own(Consumer):
            pass

        for kind in (Consumer, Own):
            consumer = kind({"bootstrap.servers": "h:1", "group.id": "a-group", "enable.auto.commit": "false"})
            assert setting(consumer, "group.id") == "a-group"
            assert setting(consumer, "enable.auto.commit") == "false"
            assert setting(consumer, "no.such.setting") is None
            consumer.close()
            assert setting(consumer, "group.id") is None

    @pytest.mark.parametrize("wrong", [{"on_poison": "ignore"}, {"attempts": 0}, {"batch": 0}])
    def test_settings_that_are_none(self, topic: Topic, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="on_poison is"):
            topic.run(**wrong)

    def test_a_connection_that_commits_by_itself(self, topic: Topic) -> None:
        topic.produce("1")
        with pytest.raises(NoTransaction):
            topic.run(connect=lambda: psycopg.connect(topic.world.dsn, autocommit=True))
        assert topic.committed_offset() < 0

    def test_a_database_without_an_inbox(self, topic: Topic) -> None:
        topic.world.db.execute("DROP TABLE inbox_parked")
        with pytest.raises(psycopg.errors.UndefinedTable) as refusal:
            topic.run()
        assert "cdc-outbox migrate inbox up" in refusal.value.__notes__[0]

    def test_what_is_no_consumer_or_inbox_for_it(self, topic: Topic) -> None:
        from cdc_outbox.inbox.django import Inbox as DjangoInbox

        connect: Any = lambda: pytest.fail("it connects")  # noqa: E731
        deserializing: Any = DeserializingConsumer({"bootstrap.servers": "h:1", "group.id": "g"})
        with pytest.raises(TypeError, match="deserialize in the handler"):
            consume(deserializing, connect, topic.handle, inbox=inbox_psycopg.Inbox("billing"))
        inbox: Any = DjangoInbox("billing")
        with pytest.raises(TypeError, match="with Django's connection psycopg's"):
            topic.run(inbox=inbox)

    def test_a_mistake_in_what_connects(self, topic: Topic) -> None:
        with pytest.raises(KeyError):
            topic.run(connect=lambda: os.environ["NO_SUCH_URL"])


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


@pytest.mark.parametrize("kind", [by_psycopg, by_psycopg2, by_sqlalchemy, by_session])
def test_with_each_kind_of_connection(topic: Topic, kind: Callable[[str], tuple[Any, Any, Any]]) -> None:
    """Handled once; poison parked, unparked; connections cut by the server in between."""
    connect, inbox, execute = kind(topic.world.dsn)
    poison = {"3"}

    def handle(connection: Any, message: Message) -> None:
        execute(connection, INSERT.format(message.id))
        if message.id in poison:
            execute(connection, "SELECT 1 / 0")

    with topic.running(handle, connect=connect, inbox=inbox, on_poison="park", attempts=2):
        topic.produce("1", "2", "1", "2")
        topic.produce("3", "4", key="a")
        topic.produce("5")
        topic.wait_for("1", "2", "5")
        wait_until(lambda: topic.states() == {"3": "parked", "4": "behind"}, "it is parked")
        topic.world.db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        topic.produce("6", "5")
        topic.wait_for("6")
        poison.clear()
        connection = connect()
        inbox.unpark(connection, "3")
        connection.commit()
        connection.close()
        topic.wait_for("3", "4")
    assert topic.effects() == ["1", "2", "5", "6", "3", "4"]
    assert topic.committed_offset() == 9


def test_of_django(topic: Topic) -> None:
    """Its own connection, so that models are saved in the loop's transaction: the recipe of the README."""
    from django.db import connections

    from support.applications import Django

    application = Django(topic.world.dsn)
    alias = application.connection

    def connect() -> psycopg.Connection[Any]:
        connections[alias].close()
        connections[alias].ensure_connection()
        connections[alias].set_autocommit(False)
        raw: psycopg.Connection[Any] = connections[alias].connection
        return raw

    def handle(_connection: Any, message: Message) -> None:
        with connections[alias].cursor() as cursor:
            cursor.execute("INSERT INTO effect VALUES (%s)", [message.id])
        if message.id == "2":
            raise ValueError("poison")

    try:
        with topic.running(handle, connect=connect, on_poison="park", attempts=1):
            topic.produce("1", "2", "3")
            topic.wait_for("1", "3")
            wait_until(lambda: topic.states() == {"2": "parked"}, "it is parked")
    finally:
        django_connections()[alias].close()
        application.close()


class TestPoison:
    def test_it_stops_the_loop(self, topic: Topic) -> None:
        """After as many attempts as asked for, with all before it done; and goes on when the handler is fixed."""
        topic.produce("1", "2", "3")
        with pytest.raises(PoisonMessage, match=r"message '2' at .*\[0\]@1: ValueError\('2 cannot be taken'\)") as told:
            topic.run(failing(topic, "2"), attempts=3)
        assert told.value.message.id == "2"
        assert [message.id for message in topic.seen].count("2") == 3
        assert topic.effects() == ["1"]
        assert topic.committed_offset() == 1
        with topic.running():
            topic.wait_for("2", "3")
        assert topic.effects() == ["1", "2", "3"]

    def test_a_batch_is_handled_one_by_one_after_a_failure(self, topic: Topic) -> None:
        with topic.running(failing(topic, "3"), on_poison="park", attempts=1):
            topic.produce("0")
            topic.wait_for("0")
            topic.produce("1", "2", "3", "4")
            topic.wait_for("1", "2", "4")
            wait_until(lambda: topic.states() == {"3": "parked"}, "it is parked")
        assert topic.committed_offset() == 5

    def test_an_error_that_the_handler_catches(self, topic: Topic) -> None:
        """The server rolls such a transaction back at COMMIT, and only says so in passing."""

        def handle(connection: psycopg.Connection[Any], message: Message) -> None:
            topic.handle(connection, message)
            if message.id == "2":
                with pytest.raises(psycopg.errors.DivisionByZero):
                    connection.execute("SELECT 1 / 0")

        with topic.running(handle, on_poison="park", attempts=1):
            topic.produce("1", "2", "3")
            topic.wait_for("1", "3")
            wait_until(lambda: topic.states() == {"2": "parked"}, "it is not lost")
        assert topic.effects() == ["1", "3"]

    def test_such_an_error_of_the_first_message(self, topic: Topic) -> None:
        """While attempts are written beforehand."""

        def handle(connection: psycopg.Connection[Any], _message: Message) -> None:
            with pytest.raises(psycopg.errors.DivisionByZero):
                connection.execute("SELECT 1 / 0")

        topic.produce("1")
        with pytest.raises(PoisonMessage, match="InFailedSqlTransaction"):
            topic.run(handle, attempts=2)
        with topic.running(handle, on_poison="park", attempts=2):
            wait_until(lambda: topic.states() == {"1": "parked"}, "it is parked")
        assert topic.world.db.execute("SELECT FROM inbox_attempt").rowcount == 0

    def test_a_handler_that_exits(self, topic: Topic) -> None:
        """As one that ends its process in any other way."""

        def handle(_connection: Any, _message: Message) -> None:
            raise SystemExit(1)

        topic.produce("1")
        for _ in range(2):
            with pytest.raises(SystemExit):
                topic.run(handle, attempts=2)
        with pytest.raises(PoisonMessage, match="the process ended"):
            topic.run(handle, attempts=2)

    def test_attempts_are_forgotten_when_it_succeeds_later(self, topic: Topic) -> None:
        failures = iter([True, True, False])

        def handle(connection: Any, message: Message) -> None:
            if message.id == "2" and next(failures):
                raise ValueError("not yet")
            topic.handle(connection, message)

        topic.produce("1", "2", "3")
        with topic.running(handle):
            topic.wait_for("1", "2", "3")
        assert topic.world.db.execute("SELECT FROM inbox_attempt").rowcount == 0

    def test_a_source_that_the_database_cannot_hold(self, postgres: str, kafka: str) -> None:
        """Not the message's fault: it is told as the driver tells it."""
        with make_world(postgres, kafka, encoding="LATIN1") as world:
            topic = make_topic(world)
            topic.produce("1")
            with pytest.raises(UnicodeEncodeError):
                topic.run(source="\u2192", on_poison="park")

    def test_what_shows_at_commit_only(self, topic: Topic) -> None:
        topic.world.db.execute("ALTER TABLE effect ADD UNIQUE (message_id) DEFERRABLE INITIALLY DEFERRED")
        topic.world.db.execute("ALTER TABLE effect DROP CONSTRAINT effect_pkey; INSERT INTO effect VALUES ('2')")
        with topic.running(on_poison="park", attempts=1):
            topic.produce("1", "2", "3")
            topic.wait_for("1", "3")
            wait_until(lambda: topic.states() == {"2": "parked"}, "it is parked")

    def test_a_message_without_an_id(self, topic: Topic) -> None:
        """It is poison at once: no handler sees it before somebody has decided."""
        topic.produce("-", headers=[("trace", b"t")], key="a", value=b"foreign")
        topic.produce("1", key="a")
        topic.produce("2")
        with pytest.raises(PoisonMessage, match="no header id or ce_id; there are: trace"):
            topic.run()
        with topic.running(on_poison="park"):
            topic.wait_for("2")
            wait_until(lambda: list(topic.states().values()) == ["parked", "behind"], "it is parked")
            ((name, error),) = topic.world.db.execute(
                "SELECT message_id, error FROM inbox_parked WHERE state = 'parked'"
            ).fetchall()
            assert "no header id or ce_id" in error
            assert topic.seen[-1].id == "2"
            with psycopg.connect(topic.world.dsn) as connection:
                inbox_psycopg.Inbox("billing").unpark(connection, name)
            topic.wait_for(name, "1")
        (foreign,) = (message for message in topic.seen if message.id == name)
        assert (foreign.value, foreign.key, foreign.headers) == (b"foreign", "a", {"trace": "t"})

    def test_one_without_an_id_stands_where_it_came(self, topic: Topic) -> None:
        """In the middle of a batch: what came before it is handled, what follows of its key is behind it."""
        topic.produce("0")
        with topic.running(on_poison="park"):
            topic.wait_for("0")
            for name in ("1", "-", "3"):
                headers: list[tuple[str, str | bytes | None]] = [] if name == "-" else [("id", name)]
                topic.producer.produce(topic.name, b"{}", "a", 0, headers=headers)
                topic.producer.produce(topic.name, b"{}", "b", 0, headers={"id": f"b-{name}"})
            topic.producer.flush()
            topic.wait_for("1", "b-1", "b--", "b-3")
            wait_until(lambda: list(topic.states().values()) == ["parked", "behind"], "it is parked")
        assert topic.effects() == ["0", "1", "b-1", "b--", "b-3"]

    def test_retries_do_not_wait_for_a_backlog(self, topic: Topic) -> None:
        failed: set[str] = set()

        def handle(connection: Any, message: Message) -> None:
            if int(message.id) % 10 == 0 and message.id not in failed:
                failed.add(message.id)
                raise ValueError("the first time")
            topic.handle(connection, message)

        topic.produce(*map(str, range(3000)))
        with topic.running(handle, on_poison="park"):
            topic.wait_for("0", "2999")
            wait_until(lambda: len(topic.seen) == 3000, "all are handled")
        assert [message.id for message in topic.seen].index("0") < 1500

    def test_a_slow_handler_is_tried_again_soon(self, topic: Topic) -> None:
        times: list[float] = []

        def handle(_connection: Any, _message: Message) -> None:
            times.append(time.monotonic())
            time.sleep(0.5)
            raise ValueError("not yet")

        topic.produce("1")
        with topic.running(handle, on_poison="park", attempts=4):
            wait_until(lambda: topic.states() == {"1": "parked"}, "it is parked", timeout_seconds=15)
        assert len(times) == 4

    def test_stops_are_no_deaths(self, topic: Topic) -> None:
        """However often it is stopped while it waits for a lock."""
        topic.produce("1")
        connect = lambda: psycopg.connect(topic.world.dsn, options="-c lock_timeout=50ms")  # noqa: E731
        with psycopg.connect(topic.world.dsn) as other:
            inbox_psycopg.Inbox("billing").once(other, Message("1", None))
            waiting = "SELECT FROM inbox_attempt WHERE attempts > 0"

            def is_begun() -> bool:
                return topic.world.db.execute(waiting).rowcount == 1

            for _ in range(4):
                with topic.running(connect=connect, on_poison="park", attempts=2):
                    wait_until(is_begun, "it was begun")
            other.rollback()
        with topic.running(on_poison="park", attempts=2):
            topic.wait_for("1")
        assert topic.states() == {}

    def test_nobody_waits_for_a_burst_of_it(self, topic: Topic) -> None:
        bad = [f"bad-{number}" for number in range(30)]
        topic.produce(*bad, "good")
        began = time.monotonic()
        with topic.running(failing(topic, *bad), on_poison="park", attempts=3):
            topic.wait_for("good")
            assert time.monotonic() - began < 5
            wait_until(lambda: list(topic.states().values()) == ["parked"] * 30, "all are parked", timeout_seconds=30)

    def test_the_next_start_begins_again(self, topic: Topic) -> None:
        """After a stop because of poison the handler is called again; nothing says that a process has died."""
        topic.produce("1")
        for _ in range(2):
            with pytest.raises(PoisonMessage, match="1 cannot be taken"):
                topic.run(failing(topic, "1"), attempts=2)
        with topic.running(attempts=2):
            topic.wait_for("1")

    def test_the_same_consumer_goes_on_where_it_was(self, topic: Topic) -> None:
        """Also one that the caller has subscribed: what was fetched and not handled is fetched again."""
        topic.produce(*map(str, range(10)))
        consumer, stop = topic.consumer(), threading.Event()
        consumer.subscribe([topic.name])
        options: Any = {"inbox": inbox_psycopg.Inbox("billing"), "attempts": 2, "stop": stop}
        with pytest.raises(PoisonMessage):
            consume(consumer, lambda: psycopg.connect(topic.world.dsn), failing(topic, "3"), **options)

        def handle(connection: Any, message: Message) -> None:
            topic.handle(connection, message)
            if message.id == "9":
                stop.set()

        consume(consumer, lambda: psycopg.connect(topic.world.dsn), handle, **options)
        consumer.close()
        assert topic.effects() == list(map(str, range(10)))

    @pytest.mark.parametrize("kind", [by_psycopg, by_psycopg2, by_sqlalchemy, by_session])
    def test_a_message_that_costs_the_connection_each_time(
        self, topic: Topic, kind: Callable[[str], tuple[Any, Any, Any]]
    ) -> None:
        """It is not taken for a database that is away: the others go on. But once is no fault of its."""
        connect, inbox, execute = kind(topic.world.dsn)
        costs = {"bad": 1_000, "once": 1}

        def handle(connection: Any, message: Message) -> None:
            execute(connection, INSERT.format(message.id))
            if costs.get(message.id, 0) > 0:
                costs[message.id] -= 1
                execute(connection, "SELECT pg_terminate_backend(pg_backend_pid())")

        with topic.running(handle, connect=connect, inbox=inbox, on_poison="park", attempts=3):
            topic.produce("1")
            topic.wait_for("1")
            topic.produce("2", "once", "bad", "3")
            topic.wait_for("2", "once", "3")
        assert topic.states() == {"bad": "parked"}

    def test_a_lock_that_is_waited_for_is_no_attempt(self, topic: Topic) -> None:
        topic.produce("1")
        with psycopg.connect(topic.world.dsn) as other:
            inbox_psycopg.Inbox("billing").once(other, Message("1", None))
            connect = lambda: psycopg.connect(topic.world.dsn, options="-c lock_timeout=50ms")  # noqa: E731
            with topic.running(connect=connect, on_poison="park", attempts=2):
                waiting = "SELECT attempts FROM inbox_attempt"
                wait_until(lambda: topic.world.db.execute(waiting).fetchall() == [(1,)], "it was begun")
                time.sleep(1.5)
                assert topic.world.db.execute(waiting).fetchall() == [(1,)]
                other.rollback()
                topic.wait_for("1")
        assert topic.states() == {}

    def test_an_id_that_the_database_cannot_hold(self, postgres: str, kafka: str) -> None:
        with make_world(postgres, kafka, encoding="LATIN1") as world:
            topic = make_topic(world)
            topic.produce("1", "m-\u2192", "2")
            with topic.running(on_poison="park"):
                topic.wait_for("1", "2")
                wait_until(lambda: list(topic.states().values()) == ["parked"], "it is parked")
            topic.produce("3", "n-\u2192")
            with pytest.raises(PoisonMessage):
                topic.run()
            assert "3" in topic.effects()

    def test_a_retry_that_succeeds_frees_its_key(self, topic: Topic) -> None:
        failures = iter([True, True, False])

        def handle(connection: Any, message: Message) -> None:
            if message.id == "1" and next(failures):
                raise ValueError("not yet")
            topic.handle(connection, message)

        with topic.running(handle, on_poison="park"):
            topic.produce("1", "2", key="a")
            topic.produce("3")
            topic.wait_for("1", "2", "3")
        assert topic.effects() == ["3", "1", "2"]
        assert set(topic.states().values()) == {"handled"}


class TestMessages:
    def test_a_tombstone_a_redriven_one_and_one_of_another_producer(self, topic: Topic) -> None:
        with topic.running():
            topic.produce("1", value=None)
            topic.produce("2", headers={"id": "2", "cdc-outbox-redriven": "17"})
            topic.produce("3", headers={"ce_id": "3", "ce_type": "paid"}, timestamp=0)
            topic.produce("4", headers={"id": "4", "cdc-outbox-replay": "1"})
            topic.wait_for("1", "2", "3", "4")
        assert topic.seen[0].value is None
        assert [message.redriven for message in topic.seen] == [False, True, False, False]
        assert topic.seen[2].type == "paid"
        assert {message.topic for message in topic.seen} == {topic.name}

    def test_ids_of_two_sources(self, topic: Topic) -> None:
        topic.produce("1")
        with topic.running(source="eu"):
            topic.wait_for("1")
        assert topic.world.db.execute("SELECT source FROM inbox").fetchall() == [("eu",)]

    def test_a_consumer_that_is_assigned_already(self, topic: Topic) -> None:
        topic.produce("1")
        consumer, stop = topic.consumer("another"), threading.Event()
        consumer.assign([TopicPartition(topic.name, 0, 0)])

        def handle(connection: Any, message: Message) -> None:
            topic.handle(connection, message)
            stop.set()

        connect = lambda: psycopg.connect(topic.world.dsn)  # noqa: E731 - as people write it
        consume(consumer, connect, handle, inbox=inbox_psycopg.Inbox("billing"), stop=stop)
        assert topic.effects() == ["1"]
        consumer.close()
        assert topic.committed_offset() == 1


def test_a_connection_that_is_set_to_something(topic: Topic) -> None:
    """Which leaves a transaction open."""

    def connect() -> psycopg.Connection[Any]:
        connection = psycopg.connect(topic.world.dsn)
        connection.execute("SET lock_timeout = '1s'")
        return connection

    topic.produce("1")
    with topic.running(connect=connect):
        topic.wait_for("1")


def test_a_parked_message_is_not_another_topics(topic: Topic) -> None:
    """Two loops with one inbox, one a topic, each with a handler of its own."""
    other = Topic(topic.world, f"{topic.name}.other", topic.producer)
    create_topic(topic.world.bootstrap_servers, other.name, partitions=1)
    topic.produce("1")
    with topic.running(failing(topic, "1"), on_poison="park", attempts=1):
        wait_until(lambda: topic.states() == {"1": "parked"}, "it is parked")
    with psycopg.connect(topic.world.dsn) as connection:
        inbox_psycopg.Inbox("billing").unpark(connection, "1")
    with other.running(on_poison="park"):
        other.produce("2")
        other.wait_for("2")
        time.sleep(1.5)
    assert [message.id for message in other.seen] == ["2"]
    with topic.running(on_poison="park"):
        topic.wait_for("1")


def test_one_that_lost_its_partition_does_not_set_the_offset_back(topic: Topic) -> None:
    """The broker would take it: it looks at the member, not at what is assigned to it."""
    first, stop = topic.consumer("first"), threading.Event()
    first.subscribe([topic.name])
    topic.produce(*map(str, range(10)))
    thread = threading.Thread(
        target=consume,
        args=(first, lambda: psycopg.connect(topic.world.dsn), topic.handle),
        kwargs={"inbox": inbox_psycopg.Inbox("billing"), "stop": stop},
    )
    thread.start()
    topic.wait_for("9")
    second = topic.consumer("a-second")
    second.subscribe([topic.name])  # of two partitions the member whose name sorts first has the first
    for _ in range(100):
        second.poll(0.1)
        if any(place.partition == 0 for place in second.assignment()):
            break
    else:
        pytest.fail("the second did not get the partition")
    second.commit(offsets=[TopicPartition(topic.name, 0, 60)], asynchronous=False)
    stop.set()
    thread.join()
    first.close()
    second.close()
    assert topic.committed_offset() == 60


def test_a_partition_that_comes_back_while_it_waited(topic: Topic) -> None:
    """Paused, taken away, and given back: it is not paused for ever."""
    consumer = topic.consumer("")
    partitions = Partitions(consumer, threading.Event())
    partitions.subscribe([topic.name])
    topic.produce("1")
    wait_until(lambda: partitions.fetch(10), "the first", timeout_seconds=20)
    other = topic.consumer("")
    other.subscribe([topic.name])

    def poll_both() -> int:
        other.poll(0.05)
        partitions.wait(0.1)
        return len(other.assignment())

    wait_until(poll_both, "the other has a partition", timeout_seconds=20)
    other.close()
    for _ in range(30):  # it ends at any moment of the rebalance
        partitions.wait(0.05)
    topic.produce("2", "3", "4", partition=1)
    topic.produce("5", partition=0)
    names: set[str] = set()

    def all_came() -> bool:
        names.update(Message.from_confluent(record).id for record in partitions.fetch(10))
        return names >= {"2", "3", "4", "5"}

    wait_until(all_came, "what was produced after it", timeout_seconds=20)
    consumer.close()


class CommitsFail(Consumer):
    code = 0

    def commit(self, *_arguments: Any, **_more: Any) -> list[TopicPartition]:  # type: ignore[override] # of its overloads
        raise KafkaException(KafkaError(self.code))


@pytest.mark.parametrize(
    ("code", "is_survived"),
    [
        (KafkaError.ILLEGAL_GENERATION, True),
        (KafkaError.UNKNOWN_MEMBER_ID, True),
        (KafkaError.REBALANCE_IN_PROGRESS, True),
        (KafkaError._STATE, True),
        (KafkaError._WAIT_COORD, True),
        (KafkaError.COORDINATOR_NOT_AVAILABLE, True),
        (KafkaError.GROUP_AUTHORIZATION_FAILED, False),
        (KafkaError.FENCED_INSTANCE_ID, False),
    ],
)
def test_offsets_that_cannot_be_committed(topic: Topic, code: int, *, is_survived: bool) -> None:
    """What passes is harmless. What does not is told: else all would come again at each start, for ever."""
    topic.consumer_class, CommitsFail.code = CommitsFail, code
    with topic.running() as failures:
        topic.produce("1", "2")
        topic.wait_for("1", "2")
        topic.produce("3")
        if is_survived:
            topic.wait_for("3")
        else:
            wait_until(lambda: failures, "it ends")
    assert bool(failures) is not is_survived
    topic.consumer_class = Consumer
    with topic.running():  # from the beginning
        topic.produce("4")
        topic.wait_for("3", "4")
    assert topic.effects() == ["1", "2", "3", "4"]


def test_signals_stop_it(topic: Topic) -> None:
    """And are the caller's again afterwards."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    topic.produce("1", "2")

    def handle(connection: Any, message: Message) -> None:
        topic.handle(connection, message)
        signal.raise_signal(signal.SIGTERM)

    topic.run(handle)
    assert topic.effects() == ["1"]  # the first of a partition are handled one by one; the rest comes again
    assert topic.committed_offset() == 1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    with topic.running():
        topic.wait_for("2")


def test_an_idle_loop_does_nothing(topic: Topic) -> None:
    with topic.running():
        topic.produce("1")
        topic.wait_for("1")
        began, cpu = time.monotonic(), time.process_time()
        time.sleep(3)
        assert time.process_time() - cpu < (time.monotonic() - began) * 0.2
