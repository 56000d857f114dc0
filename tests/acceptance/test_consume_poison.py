"""The loop and poison: where it stops, what it parks, and what follows of the same key."""

import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from cdc_outbox.inbox import Message
from cdc_outbox.inbox import psycopg as inbox_psycopg
from cdc_outbox.inbox.confluent import PoisonMessage, consume
from support.consuming import INSERT, Handler, Topic, by_psycopg, by_psycopg2, by_session, by_sqlalchemy, make_topic
from support.waiting import wait_until
from support.world import create_topic, make_world


def failing(topic: Topic, *names: str) -> Handler:
    def handle(connection: Any, message: Message) -> None:
        topic.handle(connection, message)
        if message.id in names:
            raise ValueError(f"{message.id} cannot be taken")

    return handle


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

    @pytest.mark.rest
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

    @pytest.mark.rest
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
    @pytest.mark.rest
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
