"""Settlement without a relay: an outbox, what is noted of it, and what that tells."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import psycopg
import pytest

from cdc_outbox.config import ColumnsConfig
from cdc_outbox.journal.settlement import Settlement
from cdc_outbox.operations import pruning
from cdc_outbox.operations.event_status import StuckRow, stuck_rows
from cdc_outbox.postgres import catalog
from cdc_outbox.postgres.connection import connect
from cdc_outbox.postgres.publication import check_publication
from cdc_outbox.wal.lsn import LSN
from support.waiting import wait_until
from support.world import World

NOW = timedelta(0)


COLUMNS = "(id text, aggregate_type text, aggregate_id text, event_type text, payload text, created_at timestamptz)"


def let_updates_count_after(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    for name in ("settlement.COUNTED_SECONDS", "snapshots.COUNTED_SECONDS"):
        monkeypatch.setattr(f"cdc_outbox.journal.{name}", seconds)
    monkeypatch.setattr("cdc_outbox.journal.snapshots._REPORTED_SECONDS", min(seconds, 1))


@contextlib.contextmanager
def another_session(world: World) -> Iterator[psycopg.Connection]:
    """In a transaction of its own, left open."""
    with psycopg.connect(world.dsn) as connection:
        yield connection


def make_outbox(world: World, partitioning: str = "") -> None:
    world.db.execute(f"CREATE TABLE outbox {COLUMNS} {partitioning}")
    world.db.execute("ALTER TABLE outbox ALTER created_at SET DEFAULT now()")
    if world.db.info.server_version < 150000:
        wait_until(lambda: has_counts(world), "the statistics collector knows the database")


def has_counts(world: World) -> bool:
    """14 makes a database's counts with its first report, and what was seen before says nothing of what comes after."""
    row = world.db.execute(
        "SELECT pg_stat_get_db_stat_reset_time(oid) FROM pg_database WHERE datname = current_database()"
    ).fetchone()
    assert row
    return row[0] is not None


def insert(connection: psycopg.Connection, name: str) -> None:
    connection.execute("INSERT INTO outbox (id, aggregate_id, event_type) VALUES (%s, 'a', 't')", [name])


def settlement(world: World, *, confirmed: LSN | None = None) -> Settlement:
    row = world.db.execute("SELECT system_identifier::text FROM pg_control_system()").fetchone()
    assert row
    (publication,) = world.db.execute("SELECT pubname FROM pg_publication").fetchone() or ("",)
    sent = check_publication(world.db, publication, catalog.find_table(world.db, "public.outbox"))
    return Settlement(world.db, world.slot, row[0], sent, confirmed=confirmed or world.confirmed_lsn())


def end_of_log(world: World) -> LSN:
    """Of what is inserted, not only written: a transaction that is open may be ahead of the disk."""
    row = world.db.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
    assert row
    return LSN.parse(row[0])


def take(session: Settlement) -> None:
    session._take_at = 0  # a second is over
    session.carried()
    session.take_if_due()  # False while something is open that was open in all snapshots so far


def settle(session: Settlement, world: World) -> None:
    """As if the relay had published all there is."""
    take(session)
    session.settled(end_of_log(world))


def published(world: World) -> set[str]:
    rows = world.db.execute("SELECT outbox_id FROM cdc_outbox.event_status WHERE published").fetchall()
    return {name for (name,) in rows}


def prune(world: World, *, older_than: timedelta = NOW) -> pruning.Pruned:
    with connect(world.dsn) as connection:
        table = catalog.find_table(connection, "public.outbox")
        return pruning.prune(connection, table, "id", world.slot, older_than=older_than, progress=lambda *_: None)


def left(world: World) -> set[str]:
    return {name for (name,) in world.db.execute("SELECT id FROM outbox").fetchall()}


def stuck(world: World, *, seconds: float = 0) -> list[StuckRow]:
    table = catalog.find_table(world.db, "public.outbox")
    count, rows = stuck_rows(world.db, table, ColumnsConfig(), world.slot, patience=timedelta(seconds=seconds))
    assert count == len(rows)
    return rows


def note_confirmation(world: World) -> None:
    world.db.execute(
        "INSERT INTO cdc_outbox.confirmation (slot, system_identifier, confirmed_lsn, limit_lsn, decoded_transactions,"
        " counted_since) VALUES (%s, 'any', '0/1', '0/1', 0, '') ON CONFLICT DO NOTHING",
        [world.slot],
    )


def make_partitioned(world: World) -> None:
    make_outbox(world, "PARTITION BY RANGE (created_at)")
    for name, start, end in (
        ("old", "'2001-01-01'", "'2001-02-01'"),
        ("older", "MINVALUE", "'2001-01-01'"),
        ("empty", "'2001-02-01'", "'2001-03-01'"),
        ("present", "'2001-03-01'", "MAXVALUE"),
    ):
        world.db.execute(f"CREATE TABLE outbox_{name} PARTITION OF outbox FOR VALUES FROM ({start}) TO ({end})")


def insert_at(world: World, name: str, when: str) -> None:
    world.db.execute(
        "INSERT INTO outbox (id, aggregate_id, event_type, created_at) VALUES (%s, 'a', 't', %s)", [name, when]
    )


def unknown(world: World) -> set[str]:
    rows = world.db.execute("SELECT outbox_id FROM cdc_outbox.event_status WHERE state = 'unknown'").fetchall()
    return {name for (name,) in rows}
