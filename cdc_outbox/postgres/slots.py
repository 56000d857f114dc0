"""Replication slots: what the server says of one, whose it is, and whether it can be streamed from.

Slots belong to the whole server: another database, or another program, may have one of the same name. So no hint here
tells to drop or make one without saying whose it is, what would be lost, and how to look first.
Source: PostgreSQL manual, "pg_replication_slots", "Replication Management Functions".
"""

import re
from dataclasses import dataclass
from typing import Final

from psycopg import sql

from cdc_outbox.errors import ConfigurationError, OperatorNeeded
from cdc_outbox.postgres.catalog import server_major
from cdc_outbox.postgres.connection import Connection, translated
from cdc_outbox.wal.lsn import LSN

FAILOVER_SINCE: Final = 17
PLUGIN: Final = "pgoutput"
_SLOT_NAME: Final = re.compile(r"[a-z0-9_]{1,63}")


@dataclass(frozen=True, slots=True)
class Slot:
    """A row of pg_replication_slots, with the distances that matter, in bytes."""

    name: str
    plugin: str
    database: str
    active_pid: int | None
    confirmed_lsn: LSN | None
    wal_status: str
    failover: bool | None
    """None before PostgreSQL 17."""
    lag_bytes: int | None
    """Server's WAL end minus confirmed."""
    retained_bytes: int | None
    """WAL the server keeps because of this slot."""
    safe_bytes: int | None
    """WAL that may still be written before the slot is in danger; None without max_slot_wal_keep_size."""
    temporary: bool
    two_phase: bool


def find_slot(connection: Connection, slot: str) -> Slot | None:
    check_slot_name(slot)
    failover = "failover" if server_major(connection) >= FAILOVER_SINCE else "NULL::bool"
    wal_end = (
        "CASE WHEN pg_is_in_recovery() THEN pg_last_wal_receive_lsn() ELSE pg_current_wal_lsn() END"  # a standby's end
    )
    with translated(f"looking up slot {slot}"):
        row = connection.execute(
            sql.SQL(
                f"""
                SELECT slot_name, plugin, database, active_pid, confirmed_flush_lsn::text, coalesce(wal_status, 'lost'),
                       {failover},
                       ({wal_end} - confirmed_flush_lsn)::int8, ({wal_end} - restart_lsn)::int8, safe_wal_size::int8,
                       temporary, two_phase
                  FROM pg_replication_slots WHERE slot_name = %s
                """  # noqa: S608 - the two pieces are the constants above
            ),
            [slot],
        ).fetchone()
    if row is None:
        return None
    name, plugin, database, pid, confirmed, *rest = row
    return Slot(name, plugin or "", database or "", pid, LSN.parse(confirmed) if confirmed else None, *rest)


def recreate_hint(slot: str, database: str) -> str:
    """What to know before a slot is given up for another one."""
    look = "SELECT * FROM cdc_outbox.event_status WHERE NOT published"
    return (
        f"what slot {slot!r} of database {database!r} had not sent is then in the table only, and a new slot begins "
        f"where it is made; look first: {look}; then follow 'Slot lost' in deploy/runbook.md"
    )


def check_slot(connection: Connection, slot: str) -> Slot:
    """See that ``slot`` can be streamed from. Raises OperatorNeeded naming what is wrong with it."""
    found, database = find_slot(connection, slot), connection.info.dbname
    if found is None:
        raise OperatorNeeded(
            f"replication slot {slot!r} does not exist",
            hint=f"if database {database!r} never had it: cdc-outbox migrate up; if it was dropped, "
            f"{recreate_hint(slot, database)}",
        )
    check_whose_slot(connection, found)
    if found.temporary:
        raise OperatorNeeded(
            f"replication slot {slot!r} is temporary: it goes with the session that made it",
            hint="name another with postgres.slot",
        )
    if found.two_phase:
        raise OperatorNeeded(
            f"replication slot {slot!r} has two_phase on: prepared transactions would come before they are committed",
            hint=f"name another with postgres.slot, made by cdc-outbox migrate up; {recreate_hint(slot, database)}",
        )
    if found.wal_status == "lost":
        raise OperatorNeeded(
            f"replication slot {slot!r} is lost: PostgreSQL has removed WAL that it needed",
            hint=recreate_hint(slot, database),
        )
    return found


def check_whose_slot(connection: Connection, slot: Slot) -> None:
    """See that the slot is this database's, and of a kind that could be ours. Raises OperatorNeeded."""
    database = connection.info.dbname
    if slot.plugin != PLUGIN:
        raise OperatorNeeded(
            f"replication slot {slot.name!r} uses {slot.plugin or 'physical replication'}, not {PLUGIN}: it is "
            "somebody else's",
            hint=f"let it be, and name another with postgres.slot, for example {_own_name(slot.name, database)}",
        )
    if slot.database != database:
        raise OperatorNeeded(
            f"replication slot {slot.name!r} belongs to database {slot.database!r}, not to {database!r}: a slot's name "
            "is the whole server's",
            hint=f"let it be, and name another with postgres.slot, for example {_own_name(slot.name, database)}",
        )


def _own_name(slot: str, database: str) -> str:
    return re.sub("[^a-z0-9_]", "_", f"{slot}_{database}".lower())[:63]


def create_slot_sql(connection: Connection, slot: str, *, failover: bool) -> str:
    """The statement that makes the slot; it waits for transactions that are open to end.

    Raises ConfigurationError if ``failover`` is asked of a server before 17.
    """
    check_slot_name(slot)
    if failover and server_major(connection) < FAILOVER_SINCE:
        raise ConfigurationError(
            f"PostgreSQL {server_major(connection)} has no failover slots", hint="leave --failover out before 17"
        )
    options = ", failover => true" if failover else ""
    return f"SELECT pg_create_logical_replication_slot('{slot}', '{PLUGIN}'{options});"


def check_slot_name(slot: str) -> str:
    """Raises ConfigurationError unless PostgreSQL would take ``slot`` as a slot's name."""
    if not _SLOT_NAME.fullmatch(slot):
        raise ConfigurationError(
            f"postgres.slot = {slot!r} is not a slot name",
            hint="use lower-case letters, digits and underscores, at most 63",
        )
    return slot
