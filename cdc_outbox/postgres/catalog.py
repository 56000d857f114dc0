"""The catalogue: what PostgreSQL itself says of server and table, and the check that `run` makes of the server.

Reads system tables only, never a table of the application. Source: PostgreSQL manual, "System Catalogs".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import psycopg
from psycopg import sql

from cdc_outbox.errors import ConfigurationError, OperatorNeeded
from cdc_outbox.postgres.connection import Connection, translated

OLDEST_SUPPORTED: Final = 14


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
            hint=f"name yours with outbox.table; the default one is made, in database {connection.info.dbname!r}, by: "
            "cdc-outbox migrate up",
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
                "SELECT CASE cardinality(parts) WHEN 1 THEN 'public.' || parts[1]"
                " WHEN 2 THEN parts[1] || '.' || parts[2] END"
                " FROM unnest(%s::text[]) AS name, parse_ident(name) AS parts",
                [list(names)],
            ).fetchall()
        except psycopg.errors.InvalidParameterValue:
            rows = [(None,)]
    if (None,) in rows:
        raise ConfigurationError(
            f"{key} = {list(names)!r} holds what is not a table name",
            hint='write each as in SQL: schema.table, or "Schema"."Table"',
        )
    return frozenset(name for (name,) in rows)
