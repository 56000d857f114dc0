"""The replication connection does nothing but stream: what is asked there spoils what the server decodes (18)."""

import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from cdc_outbox.demo.relay import RelayProcess
from support import command
from support.relays import CheckedRelay
from support.waiting import wait_until
from support.wire import listening
from support.world import World

#: All that may be said on it.
ALLOWED = re.compile(
    r"\s*(SET [\w.]+ = ('[^']*'|\d+);?\s*)+|IDENTIFY_SYSTEM|TIMELINE_HISTORY \d+"
    r'|CREATE_REPLICATION_SLOT "\w+" TEMPORARY .*|START_REPLICATION SLOT .*'
)


@contextmanager
def relay(world: World, tmp_path: Path) -> Iterator[RelayProcess]:
    settings = {key: value for key, value in world.environment.items() if key != "CDC_OUTBOX_HTTP__LISTEN"}
    with CheckedRelay(settings, tmp_path / "relay.log") as process:
        yield process


def run_until_confirmed(world: World, tmp_path: Path) -> None:
    with relay(world, tmp_path) as process:
        process.wait_until_ready()
        world.wait_until_confirmed()


def tail_one(world: World, tmp_path: Path) -> None:
    slots = "SELECT FROM pg_replication_slots WHERE database = %s AND temporary AND active"
    with command.start(world.environment, "tail", "--json") as tail:
        try:
            wait_until(lambda: world.db.execute(slots, [world.name]).rowcount, "tail has its slot", timeout_seconds=30)
            world.insert("t")
            assert tail.stdout
            assert tail.stdout.readline()
        finally:
            tail.send_signal(signal.SIGINT)
            assert tail.wait(20) == 0


def doctor(world: World, tmp_path: Path) -> None:
    own_topic = {"CDC_OUTBOX_KAFKA__TOPIC": f"outbox.{world.name}_event"}  # what other tests left is none of ours
    done = command.run({**world.environment, **own_topic}, "doctor")
    assert "round trip: a canary was in" in done.out


@pytest.mark.parametrize("use", [run_until_confirmed, tail_one, doctor])
def test_nothing_is_asked_on_the_connection_that_streams(
    world: World, tmp_path: Path, use: Callable[[World, Path], None]
) -> None:
    world.migrate()
    world.settings["CDC_OUTBOX_KAFKA__CREATE_TOPICS"] = "true"
    world.insert(world.create_topic())
    with listening(world.dsn) as (dsn, sessions):
        world.settings["CDC_OUTBOX_POSTGRES__DSN"] = dsn
        use(world, tmp_path)
    streaming = [session for session in sessions if session.streams]
    assert any(said.startswith("START_REPLICATION") for session in streaming for said in session.statements)
    assert [said for session in streaming for said in session.statements if not ALLOWED.fullmatch(said)] == []
    assert any(not session.streams for session in sessions), "what is asked is asked elsewhere"


CHANGES = {
    "key becomes a number": "ALTER TABLE outbox ALTER aggregate_id TYPE bigint USING length(aggregate_id)",
    "payload becomes jsonb": "ALTER TABLE outbox ALTER payload TYPE jsonb",
    "column before is dropped": "ALTER TABLE outbox DROP COLUMN spare",
    "column is added": "ALTER TABLE outbox ADD COLUMN late text NOT NULL DEFAULT 'x'",
    "column is created again": "ALTER TABLE outbox DROP COLUMN spare; ALTER TABLE outbox ADD COLUMN spare bytea",
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_rows_from_before_a_change_of_their_table_come_as_they_were_written(
    every_world: World, tmp_path: Path, change: str
) -> None:
    world = every_world
    world.db.execute(
        "CREATE TABLE outbox (spare int DEFAULT 7, id uuid, aggregate_type text, aggregate_id text, event_type text,"
        " payload json)"
    )
    world.migrate()
    aggregate_type = world.create_topic()
    for number in range(20):
        world.insert(aggregate_type, "5" * number + "7", payload=f'{{"number":  {number}}}')
    world.db.execute("DROP VIEW cdc_outbox.event_status")
    world.db.execute(change.encode())
    world.insert(aggregate_type, "4", payload="null")
    run_until_confirmed(world, tmp_path)
    messages = world.read(aggregate_type, 21)
    got = {(message.key(), message.value()) for message in messages if message.value() != b"null"}
    assert got == {(b"5" * number + b"7", f'{{"number":  {number}}}'.encode()) for number in range(20)}
    assert len(messages) == 21


def test_a_column_renamed_while_rows_wait(every_world: World, tmp_path: Path) -> None:
    world = every_world
    world.migrate()
    aggregate_type = world.create_topic()
    world.insert(aggregate_type, "before")
    world.db.execute("ALTER TABLE outbox RENAME aggregate_id TO subject")
    world.db.execute(
        "INSERT INTO outbox (aggregate_type, subject, event_type) VALUES (%s, 'after', 'tested')", [aggregate_type]
    )
    world.settings["CDC_OUTBOX_OUTBOX__COLUMNS__AGGREGATE_ID"] = "subject"
    done = command.run(world.environment, "run")
    assert done.exit_code == 3
    assert "rows of public.outbox come without column 'subject', wanted for aggregate_id" in done.error
    assert "outbox.columns.aggregate_id = ['subject', '...']" in done.error
    world.settings["CDC_OUTBOX_OUTBOX__COLUMNS__AGGREGATE_ID"] = '["subject", "aggregate_id"]'
    run_until_confirmed(world, tmp_path)
    assert {message.key() for message in world.read(aggregate_type, 2)} == {b"before", b"after"}


@contextmanager
def locked(world: World, *tables: str) -> Iterator[None]:
    with psycopg.connect(world.dsn) as other:
        for table in tables:
            other.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE".encode())
        yield


def test_a_lock_on_the_outbox_holds_nobody_up(every_world: World, tmp_path: Path) -> None:
    world = every_world
    world.migrate()
    world.settings["CDC_OUTBOX_KAFKA__CREATE_TOPICS"] = "true"
    aggregate_type = world.create_topic()
    world.insert(aggregate_type)
    with locked(world, "outbox"):
        run_until_confirmed(world, tmp_path)
        done = command.run(world.environment, "doctor", timeout_seconds=40)
        assert "publication: 'cdc_outbox' sends every row of public.outbox" in done.out
    assert len(world.read(aggregate_type, 1)) == 1


@pytest.mark.parametrize("table", ["cdc_outbox.confirmation", "cdc_outbox.settled", "pg_publication"])
@pytest.mark.rest
def test_a_lock_on_what_the_start_asks_is_said_and_ends_with_a_shutdown(
    world: World, tmp_path: Path, table: str
) -> None:
    world.migrate()
    with locked(world, table), relay(world, tmp_path) as process:
        wait_until(lambda: "timeout" in (process.readyz() or {}).get("reason", ""), "it is said", timeout_seconds=10)
        began = time.monotonic()
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(10) == 0
        assert time.monotonic() - began < 3
    with relay(world, tmp_path) as process:
        process.wait_until_ready()


def test_a_server_that_does_not_answer_the_connection_ends_with_a_shutdown(world: World, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        world.settings["CDC_OUTBOX_POSTGRES__DSN"] = f"host=127.0.0.1 port={port} connect_timeout=0"
        with relay(world, tmp_path) as process:
            connection, _ = deaf.accept()  # it is being waited for
            with connection:
                process.process.send_signal(signal.SIGTERM)
                assert process.process.wait(5) == 0


def test_tail_can_be_ended_while_it_waits_for_open_transactions(world: World) -> None:
    world.migrate()
    with psycopg.connect(world.dsn) as other:
        other.execute("SELECT pg_current_xact_id()")
        waiting = "SELECT FROM pg_stat_activity WHERE datname = %s AND query LIKE 'CREATE_REPLICATION_SLOT%%'"
        with command.start(world.environment, "tail") as tail:
            wait_until(lambda: world.db.execute(waiting, [world.name]).rowcount, "it waits", timeout_seconds=30)
            tail.send_signal(signal.SIGTERM)
            try:
                assert tail.wait(5) == 0
            except subprocess.TimeoutExpired:
                tail.kill()
                raise
