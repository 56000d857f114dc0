"""The loop from outside: what it refuses, how it takes odd messages and stops; with every kind of connection."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from confluent_kafka import Consumer, DeserializingConsumer, KafkaError, KafkaException, TopicPartition

from cdc_outbox.inbox import Message, NoTransaction
from cdc_outbox.inbox import psycopg as inbox_psycopg
from cdc_outbox.inbox.confluent import consume
from cdc_outbox.inbox.librdkafka import setting
from cdc_outbox.inbox.partitions import Partitions
from support.applications import django_connections
from support.consuming import INSERT, Topic, by_psycopg, by_psycopg2, by_session, by_sqlalchemy
from support.waiting import wait_until


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


@pytest.mark.parametrize("kind", [by_psycopg, by_psycopg2, by_sqlalchemy, by_session])
@pytest.mark.rest
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


@pytest.mark.rest
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
@pytest.mark.rest
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
