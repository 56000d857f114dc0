"""The catalogue: what PostgreSQL itself says of server, slot, publication and table, and the check that `run` makes.

Reads system views only, never a table of the application. Works over the replication connection too (simple protocol).
Source: PostgreSQL manual, "System Catalogs", "pg_replication_slots", "Replication Management Functions".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import psycopg
from psycopg import sql

from cdc_outbox.errors import ConfigurationError, OperatorNeeded
from cdc_outbox.postgres.connection import MIGRATE_HINT, Connection, translated
from cdc_outbox.postgres.lsn import LSN
from cdc_outbox.postgres.stream import check_slot_name

OLDEST_SUPPORTED: Final = 14
FAILOVER_SINCE: Final = 17
PLUGIN: Final = "pgoutput"


@dataclass(frozen=True, slots=True)
class Table:
    """A table as the catalogue has it; ``columns`` maps name to type OID."""

    oid: int
    namespace: str
    name: str
    columns: dict[str, int]
    generated: frozenset[str] = frozenset()
    """Columns that PostgreSQL computes."""

    def __str__(self) -> str:
        return f"{self.namespace}.{self.name}"

    @property
    def identifier(self) -> sql.Identifier:
        """Quoted, for statements."""
        return sql.Identifier(self.namespace, self.name)


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


def check_server(connection: Connection) -> None:
    """Raises OperatorNeeded if the server is too old or does not write logical WAL."""
    version = server_major(connection)
    if version < OLDEST_SUPPORTED:
        raise OperatorNeeded(f"PostgreSQL {version} is not supported", hint=f"use {OLDEST_SUPPORTED} or newer")
    with translated("reading wal_level"):
        row = connection.execute("SELECT current_setting('wal_level')").fetchone()
    if row != ("logical",):
        raise OperatorNeeded(
            f"the server's wal_level is {row and row[0]}, not logical",
            hint="ALTER SYSTEM SET wal_level = 'logical', and restart PostgreSQL",
        )


def server_major(connection: Connection) -> int:
    return connection.info.server_version // 10_000


def find_table(connection: Connection, qualified_name: str) -> Table:
    """The table named as in SQL (``app.outbox``, ``"Odd Name"``), in schema public if no other is named.

    PostgreSQL itself reads the name (parse_ident), and no right to the table or its schema is needed.
    Raises ConfigurationError if that is not a name, OperatorNeeded if there is no such table.
    """
    with translated(f"looking up table {qualified_name}"):
        try:
            rows = connection.execute(
                """
                SELECT c.oid::int8, n.nspname, c.relname, a.attname, a.atttypid::int8, a.attgenerated <> ''
                  FROM (SELECT parse_ident(%s)) AS given (parts)
                  JOIN pg_namespace n ON n.nspname = CASE cardinality(parts) WHEN 1 THEN 'public' ELSE parts[1] END
                  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = parts[cardinality(parts)]
                  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                 WHERE cardinality(parts) <= 2 AND c.relkind IN ('r', 'p')
                 ORDER BY a.attnum
                """,
                [qualified_name],
            ).fetchall()
        except psycopg.errors.InvalidParameterValue as error:
            raise ConfigurationError(
                f"outbox.table = {qualified_name!r} is not a table name",
                hint='write it as in SQL: schema.table, or "Schema"."Table"',
            ) from error
    if not rows:
        raise OperatorNeeded(
            f"table {qualified_name} does not exist",
            hint="name yours with outbox.table; the default one is made by: cdc-outbox migrate up",
        )
    oid, namespace, name, *_ = rows[0]
    return Table(
        oid,
        namespace,
        name,
        {column: type_oid for *_, column, type_oid, _ in rows},
        frozenset(column for *_, column, _, is_generated in rows if is_generated),
    )


def read_names(connection: Connection, names: Sequence[str], key: str) -> frozenset[str]:
    """Table names as in SQL, made whole and unquoted. Raises ConfigurationError naming ``key`` if one is none."""
    with translated(f"reading {key}"):
        try:
            rows = connection.execute(
                "SELECT CASE cardinality(parts) WHEN 1 THEN 'public.' ELSE parts[1] || '.' END"
                " || parts[cardinality(parts)] FROM unnest(%s::text[]) AS name, parse_ident(name) AS parts",
                [list(names)],
            ).fetchall()
        except psycopg.errors.InvalidParameterValue as error:
            raise ConfigurationError(
                f"{key} = {list(names)!r} holds what is not a table name",
                hint='write each as in SQL: schema.table, or "Schema"."Table"',
            ) from error
    return frozenset(name for (name,) in rows)


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
                       ({wal_end} - confirmed_flush_lsn)::int8, ({wal_end} - restart_lsn)::int8, safe_wal_size::int8
                  FROM pg_replication_slots WHERE slot_name = %s
                """  # noqa: S608 - the two pieces are the constants above
            ),
            [slot],
        ).fetchone()
    if row is None:
        return None
    name, plugin, database, pid, confirmed, *rest = row
    return Slot(name, plugin or "", database or "", pid, LSN.parse(confirmed) if confirmed else None, *rest)


def check_slot(connection: Connection, slot: str) -> Slot:
    """See that ``slot`` can be streamed from. Raises OperatorNeeded naming what is wrong with it."""
    found = find_slot(connection, slot)
    if found is None:
        raise OperatorNeeded(f"replication slot {slot!r} does not exist", hint=MIGRATE_HINT)
    if found.plugin != PLUGIN:
        raise OperatorNeeded(
            f"replication slot {slot!r} uses {found.plugin or 'physical replication'}, not {PLUGIN}",
            hint="name another with postgres.slot",
        )
    if found.database != connection.info.dbname:
        raise OperatorNeeded(
            f"replication slot {slot!r} belongs to database {found.database!r}",
            hint="name another with postgres.slot, or connect to that database",
        )
    if found.wal_status == "lost":
        raise OperatorNeeded(
            f"replication slot {slot!r} is lost: PostgreSQL has removed WAL that it needed",
            hint="events after its last confirmed LSN must be recovered from the table; then drop the slot and run: "
            "cdc-outbox migrate up",
        )
    return found


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
