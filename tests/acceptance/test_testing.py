"""What ``cdc_outbox.testing`` gives to an application's tests: assertions that fail when they should, and a stack."""

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka.admin import AdminClient

from cdc_outbox import testing
from cdc_outbox.inbox import Message
from cdc_outbox.inbox import schema as inbox_sql
from cdc_outbox.inbox.psycopg import AsyncInbox, Inbox
from cdc_outbox.outbox import Event
from cdc_outbox.outbox.table import OutboxTable
from support.applications import (
    ALL,
    Application,
    Asynchronous,
    Asyncpg,
    AsyncPsycopg,
    Django,
    SqlalchemyAsyncConnection,
    SqlalchemyAsyncSession,
    django_connections,
    make_emit,
)
from support.waiting import wait_until
from support.world import World


@pytest.fixture
def migrated(world: World) -> World:
    world.migrate()
    return world


@pytest.fixture(params=ALL)
def application(request: pytest.FixtureRequest, migrated: World) -> Iterator[Application]:
    started = request.param(migrated.dsn)
    yield started
    started.close()


def check(application: Application, *arguments: Any, **more: Any) -> Any:
    connection = application.connection
    if isinstance(application, Asynchronous):
        return application.finish(testing.assert_emitted_async(connection, *arguments, **more))
    if isinstance(application, Django):
        connection = django_connections()[connection]
    return testing.assert_emitted(connection, *arguments, **more)


def test_it_sees_what_is_not_committed(migrated: World, application: Application) -> None:
    event = Event("order.placed", "42", {"total": 1.5}, headers={"tenant": "t", "region": "eu"})
    with pytest.raises(ZeroDivisionError), application.inside(application.transaction()):
        make_emit(application)(event)
        (found,) = check(
            application, "order.placed", aggregate_id="42", payload={"total": 1.5}, headers={"tenant": "t"}, count=1
        )
        assert found.id == str(event.id)
        assert (found.aggregate_type, found.headers) == ("event", {"tenant": "t", "region": "eu"})
        with pytest.raises(AssertionError, match=r"no events 'order\.placed' of aggregate '43'"):
            check(application, "order.placed", aggregate_id="43")
        1 / 0  # noqa: B018
    with application.inside(application.transaction()):
        with pytest.raises(AssertionError, match=r'in "public"\."outbox"; it is empty'):
            check(application, "order.placed")
        check(application, "order.placed", count=0)


def test_it_says_what_is_there_instead(migrated: World, assert_emitted: Any) -> None:
    from cdc_outbox.outbox.psycopg import Outbox

    with psycopg.connect(migrated.dsn, row_factory=psycopg.rows.dict_row) as connection:
        for number in range(20):
            Outbox().emit(connection, Event("order.placed", str(number), {"n": number}))
        Outbox().emit(connection, Event("order.gone", "1", None, headers={"why": "x"}))
        assert_emitted(connection, "order.gone", payload=None)
        with pytest.raises(AssertionError) as failure:
            assert_emitted(connection, "order.gone", payload={"a": 1}, headers={"why": "y"}, count=2)
    lines = str(failure.value).splitlines()
    assert lines[0] == (
        "no events 'order.gone' with payload {'a': 1} with headers {'why': 'y'}, not 2, in \"public\".\"outbox\";"
        " the last of the 21 there:"
    )
    assert lines[-1] == "  order.gone 1 None {'why': 'x'}"
    assert len(lines) == 11


@pytest.mark.parametrize(("payload_type", "payload"), [("text", "no JSON"), ("bytea", b"\x00\xff")])
def test_a_table_of_ones_own(world: World, payload_type: Any, payload: Any) -> None:
    world.db.execute(f"CREATE TABLE events (id text, aggregate_id int, kind text, data {payload_type})".encode())
    from cdc_outbox.outbox.psycopg import Outbox

    columns = {"event_type": "kind", "payload": "data", "headers": None, "aggregate_type": None}
    outbox = Outbox("events", columns=columns, payload_type=payload_type)
    with psycopg.connect(world.dsn) as connection:
        outbox.emit(connection, Event("order.placed", "42", payload))
        testing.assert_emitted(connection, "order.placed", aggregate_id="42", payload=payload, outbox=outbox)


def test_any_database_is_asked_in_autocommit_mode_too(migrated: World) -> None:
    migrated.insert("order", "42")
    testing.assert_emitted(migrated.db, "tested", aggregate_id="42", outbox=OutboxTable())


class TestIdempotent:
    @pytest.fixture
    def connection(self, world: World) -> psycopg.Connection[Any]:
        world.db.execute(inbox_sql.sql().encode())
        world.db.execute("CREATE TABLE effect (message_id text)")
        return world.db

    message = Message("m-1", datetime.now(UTC))

    def effects(self, connection: psycopg.Connection[Any]) -> list[Any]:
        return connection.execute("SELECT message_id FROM effect").fetchall()

    def test_one_that_is(self, connection: psycopg.Connection[Any], assert_idempotent: Any) -> None:
        def handle(message: Message) -> None:
            with connection.transaction():
                if Inbox("billing").once(connection, message):
                    connection.execute("INSERT INTO effect VALUES (%s)", [message.id])

        assert_idempotent(handle, self.message, state=lambda: self.effects(connection))

    def test_one_that_acts_each_time(self, connection: psycopg.Connection[Any]) -> None:
        def handle(message: Message) -> None:
            connection.execute("INSERT INTO effect VALUES (%s)", [message.id])

        with pytest.raises(AssertionError, match="second delivery of the same message acted again"):
            testing.assert_idempotent(handle, self.message, state=lambda: self.effects(connection))

    def test_one_that_does_nothing_proves_nothing(self, connection: psycopg.Connection[Any]) -> None:
        with pytest.raises(AssertionError, match="this test could not fail"):
            testing.assert_idempotent(lambda _: None, self.message, state=lambda: self.effects(connection))

    @pytest.mark.usefixtures("connection")
    def test_coroutines(self, world: World, assert_idempotent_async: Any) -> None:
        import asyncio

        async def run() -> None:
            async with await psycopg.AsyncConnection.connect(world.dsn, autocommit=True) as own:

                async def handle(message: Message) -> None:
                    async with own.transaction():
                        if await AsyncInbox("billing").once(own, message):
                            await own.execute("INSERT INTO effect VALUES (%s)", [message.id])

                async def handle_badly(message: Message) -> None:
                    await own.execute("INSERT INTO effect VALUES (%s)", [message.id])

                async def effects() -> list[Any]:
                    return await (await own.execute("SELECT message_id FROM effect")).fetchall()

                await assert_idempotent_async(handle, self.message, state=effects)
                with pytest.raises(AssertionError, match="acted again"):
                    await testing.assert_idempotent_async(handle_badly, self.message, state=effects)

        asyncio.run(run())


END_TO_END = """
import psycopg
from confluent_kafka import Consumer

from cdc_outbox.inbox.psycopg import Inbox, Message
from cdc_outbox.outbox.psycopg import Event, Outbox


def test_order(cdc_outbox_stack, assert_emitted, assert_idempotent):
    with psycopg.connect(cdc_outbox_stack.dsn) as connection:
        event_id = Outbox().emit(connection, Event("order.placed", "42", {"total": 1}, aggregate_type="order"))
        assert_emitted(connection, "order.placed", aggregate_id="42")
    settings = {"bootstrap.servers": cdc_outbox_stack.bootstrap_servers, "group.id": "the test's"}
    consumer = Consumer({**settings, "auto.offset.reset": "earliest", "topic.metadata.refresh.interval.ms": 200})
    consumer.subscribe([cdc_outbox_stack.topic("order")])
    record = None
    while record is None or record.error():
        record = consumer.poll(10)
    consumer.close()
    message = Message.from_confluent(record)
    assert message.id == str(event_id)
    effects = []

    def handle(message):
        with psycopg.connect(cdc_outbox_stack.dsn) as connection:
            if Inbox("billing").once(connection, message):
                effects.append(message.id)

    assert_idempotent(handle, message, state=lambda: list(effects))
"""


@pytest.mark.rest
def test_the_stack_of_the_plugin(world: World, tmp_path: Path) -> None:
    """As somebody has it who has installed us and has written a test; on the suite's servers, not to start more."""
    (tmp_path / "test_order.py").write_text(END_TO_END)
    servers = {
        "CDC_OUTBOX_TEST_POSTGRES_DSN": world.admin_dsn,
        "CDC_OUTBOX_TEST_KAFKA_BOOTSTRAP_SERVERS": world.bootstrap_servers,
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "test_order.py"],
        cwd=tmp_path,
        env={**os.environ, **servers},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert nothing_is_left(world)


def nothing_is_left(world: World) -> bool:
    databases = world.db.execute("SELECT FROM pg_database WHERE datname LIKE 'cdc_outbox_test_%'").rowcount
    topics = AdminClient({"bootstrap.servers": world.bootstrap_servers}).list_topics(timeout=10).topics
    return not databases and not [topic for topic in topics if topic.startswith("cdc_outbox_test_")]


@pytest.mark.rest
def test_a_run_that_is_terminated_leaves_nothing(world: World, tmp_path: Path) -> None:
    """As a CI ends a job that takes too long."""
    (tmp_path / "test_wait.py").write_text(
        "import time\n\ndef test_wait(cdc_outbox_stack):\n    open('up', 'w').close()\n    time.sleep(60)\n"
    )
    servers = {
        "CDC_OUTBOX_TEST_POSTGRES_DSN": world.admin_dsn,
        "CDC_OUTBOX_TEST_KAFKA_BOOTSTRAP_SERVERS": world.bootstrap_servers,
    }
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "pytest", "-q", "test_wait.py"]
        process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **servers}, stdout=log, stderr=log)
    wait_until((tmp_path / "up").exists, "the stack is up", timeout_seconds=60)
    process.terminate()
    assert process.wait(60) == 2, (tmp_path / "log").read_text()  # interrupted, says pytest
    assert nothing_is_left(world)


def test_an_asynchronous_connection_is_told_apart(migrated: World) -> None:
    for kind in (Asyncpg, AsyncPsycopg, SqlalchemyAsyncSession, SqlalchemyAsyncConnection):
        application = kind(migrated.dsn)
        with pytest.raises(TypeError, match="await assert_emitted_async"):
            testing.assert_emitted(application.connection, "order.placed")
        application.close()
