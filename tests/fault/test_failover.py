"""Failover for real: PostgreSQL 18, a primary and a standby that keeps the slot too, promoted while events flow.

What has to be set, and why, is in the runbook (deploy/runbook.md, "Move to a new primary").
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import conninfo

from cdc_outbox.demo.postgres import EmbeddedPostgres
from cdc_outbox.demo.stack import running, server_folder
from cdc_outbox.wal.lsn import LSN
from fault.checker import Evidence, judge
from fault.reader import read_to_the_end
from fault.stage import Incident, Outcome, reconnected
from fault.writer import Writer
from support import command
from support.relays import CheckedRelay
from support.waiting import wait_until
from support.world import World, make_world

_STANDBY = "standby"


class Standby(EmbeddedPostgres):
    """A copy of ``primary`` that follows it, and syncs its failover slots."""

    def __init__(self, folder: Path, primary: EmbeddedPostgres) -> None:
        super().__init__(folder)
        self._primary = primary
        self._password = primary._password

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """Its walreceiver is frozen; what was on its way is lost."""
        with psycopg.connect(self.dsn()) as connection:
            row = connection.execute("SELECT pid FROM pg_stat_wal_receiver").fetchone()
        assert row
        os.kill(row[0], signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(row[0], signal.SIGKILL)

    def promote(self) -> None:
        self._run("pg_ctl", "-D", str(self.data), "-w", "promote")

    def _initialise(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._account:
            os.chown(self._folder, self._account.pw_uid, self._account.pw_gid)
        source = conninfo.make_conninfo(self._primary.dsn(), application_name=_STANDBY)
        slot = ["-C", "-S", _STANDBY]
        self._run("pg_basebackup", "-d", source, "-D", str(self.data), "-R", *slot, "-X", "stream", "-c", "fast")
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(f"port = {self.port}\nhot_standby_feedback = on\nsync_replication_slots = on\n")
            # What the primary's walsenders wait for; this one, once promoted, would wait for itself.
            file.write("synchronized_standby_slots = ''\n")


@pytest.fixture
def pair() -> Iterator[tuple[EmbeddedPostgres, Standby]]:
    with server_folder() as folder, ExitStack() as stack:
        primary = EmbeddedPostgres(folder / "primary")
        stack.enter_context(running(primary))
        standby = Standby(folder / "standby", primary)
        stack.enter_context(running(standby))
        with psycopg.connect(primary.dsn(), autocommit=True) as connection:
            connection.execute(f"ALTER SYSTEM SET synchronized_standby_slots = '{_STANDBY}'")
            # So that what the application was told to be committed is what the standby has.
            connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{_STANDBY}'")
            connection.execute("SELECT pg_reload_conf()")
        yield primary, standby


@pytest.fixture
def world(pair: tuple[EmbeddedPostgres, Standby], kafka: str) -> Iterator[World]:
    """Its DSN names both servers, and takes whichever is the primary."""
    primary, standby = pair
    both: dict[str, Any] = {"host": "127.0.0.1,127.0.0.1", "port": f"{primary.port},{standby.port}"}
    dsn = conninfo.make_conninfo(primary.dsn(), **both, target_session_attrs="read-write")
    with make_world(dsn, kafka) as made:
        yield made


def slot_is_synced(standby: Standby, slot: str) -> bool:
    query = "SELECT synced AND NOT temporary FROM pg_replication_slots WHERE slot_name = %s"
    with psycopg.connect(standby.dsn()) as connection:
        return connection.execute(query, [slot]).fetchone() == (True,)


def test_the_relay_follows_to_the_standby(
    world: World, pair: tuple[EmbeddedPostgres, Standby], tmp_path: Path, outcomes: list[Outcome]
) -> None:
    primary, standby = pair
    assert command.run(world.environment, "migrate", "up", "--failover").exit_code == 0
    types = [world.create_topic("order"), world.create_topic("customer")]
    environment = {key: value for key, value in world.environment.items() if not key.endswith("LISTEN")}
    with CheckedRelay(environment, tmp_path / "relay.log") as relay:
        relay.wait_until_ready()
        writer = Writer(world.dsn, types, seed=70, events_per_second=300)
        writer.start()
        try:
            wait_until(lambda: slot_is_synced(standby, world.slot), "the standby has the slot", timeout_seconds=60)
            wait_for_more(writer, 500)
            began = time.time()
            primary.stop("immediate")
            standby.promote()
            world.db = reconnected(world)
            world.wait_until_confirmed()
            recovered = time.time() - began
            wait_for_more(writer, 500)
        finally:
            ledger = writer.stop()
        world.wait_until_confirmed()
        records = read_to_the_end(world.bootstrap_servers, [f"outbox.{name}" for name in types])
        verdict = judge(Evidence(committed=ledger.committed, records=records))
        assert not verdict.broken_promises(), relay.said()
    outcome = Outcome("failover to a standby with the slot synced", [Incident(began, None, recovered)], verdict)
    outcomes.append(outcome)


def test_a_dead_letter_that_the_standby_lacks_is_not_confirmed(
    world: World, pair: tuple[EmbeddedPostgres, Standby], tmp_path: Path
) -> None:
    """The server waits for the standby before it sends the event; the relay writes its row after that."""
    primary, standby = pair
    world.settings["CDC_OUTBOX_RELAY__ON_POISON"] = "dead-letter"
    with psycopg.connect(primary.dsn(), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = ''")  # what is committed need not be there
        connection.execute("SELECT pg_reload_conf()")
    assert command.run(world.environment, "migrate", "up", "--failover").exit_code == 0
    environment = {key: value for key, value in world.environment.items() if not key.endswith("LISTEN")}
    with CheckedRelay(environment, tmp_path / "relay.log") as relay:
        relay.wait_until_ready()
        wait_until(lambda: slot_is_synced(standby, world.slot), "the standby has the slot", timeout_seconds=60)
        with ExitStack() as cut_off:
            with psycopg.connect(world.dsn) as locking:
                locking.execute("LOCK TABLE cdc_outbox.parked IN ACCESS EXCLUSIVE MODE")
                event = world.insert("no topic")
                wait_until(lambda: waits_for_lock(world), "the relay has the event, and cannot write its row")
                cut_off.enter_context(standby.cut_off())
            wait_until(lambda: dead_letters(world) == [event], "the row is written, where the standby does not see it")
            time.sleep(2)  # a hundred times as long as a confirmation takes
            (commit_lsn,) = world.db.execute("SELECT commit_lsn::text FROM cdc_outbox.parked").fetchone() or ("",)
            assert world.confirmed_lsn() <= LSN.parse(commit_lsn), "it would be lost with the primary"
            assert relay.process.poll() is None, relay.said()
            primary.stop("immediate")
        wait_until(lambda: is_up(standby), "the standby has recovered from that")
        promoted_at = datetime.now(UTC)
        standby.promote()
        world.db = reconnected(world)
        wait_until(lambda: dead_letters(world) == [event], "it is sent again, and kept", timeout_seconds=60)
        (created_at,) = world.db.execute("SELECT created_at FROM cdc_outbox.parked").fetchone() or (None,)
        assert created_at > promoted_at, "the standby had it, and this test shows nothing"
        world.wait_until_confirmed()


def is_up(standby: Standby) -> bool:
    with suppress(psycopg.OperationalError), psycopg.connect(standby.dsn()):
        return True
    return False


def waits_for_lock(world: World) -> bool:
    query = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = 'cdc-outbox state'"
    return world.db.execute(query).rowcount == 1


def dead_letters(world: World) -> list[str]:
    return [event_id for (event_id,) in world.db.execute("SELECT event_id FROM cdc_outbox.parked")]


def wait_for_more(writer: Writer, count: int) -> None:
    enough = len(writer.ledger.committed) + count
    wait_until(lambda: len(writer.ledger.committed) >= enough, f"{count} events more", timeout_seconds=60)
