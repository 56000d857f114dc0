"""Topic values: what the outbox's rows hold in the columns that name a topic, for people who make topics ahead.

Needs SELECT on the outbox. Dead letters count too: they wait for a topic although their row may have gone.
"""

import re
from collections.abc import Sequence
from typing import Final

from psycopg import sql

from cdc_outbox.postgres.catalog import Table
from cdc_outbox.postgres.connection import READER, Connection, encoding_of, granting, translated

#: Of each column, None for NULL, in UTF-8; and how many rows hold them.
Counted = tuple[tuple[bytes | None, ...], int]

#: A string in SQL, as PostgreSQL shows it, with or without a cast.
_LITERAL: Final = re.compile("'((?:[^']|'')*)'(?:::|$)")


def of_rows(connection: Connection, table: Table, columns: Sequence[str]) -> list[Counted]:
    """Raises OperatorNeeded without the right to read the table."""
    named = [sql.Identifier(column) for column in columns]
    stored = [sql.SQL("convert_to(max({}::text), getdatabaseencoding()::name)").format(column) for column in named]
    query = sql.SQL("SELECT {}, count(*) FROM {} GROUP BY {} ORDER BY count(*) DESC").format(
        sql.SQL(", ").join(stored),
        table.identifier,
        sql.SQL(", ").join(sql.SQL("{}::text").format(column) for column in named),  # as it is written, of citext too
    )
    rights = granting(connection, f"SELECT ON {table.identifier.as_string()}", schema=table.namespace)
    with translated(f"reading topics from {table}", rights):
        rows = connection.execute(query).fetchall()
    encoding = encoding_of(connection)

    def in_utf8(stored: bytes | None) -> bytes | None:
        return None if stored is None else encoding.text(stored).encode()

    return [(tuple(map(in_utf8, stored)), count) for *stored, count in rows]


def of_defaults(connection: Connection, table: Table, columns: Sequence[str]) -> tuple[bytes, ...] | None:
    """What a row gets that says nothing; None unless each column has a text for that."""
    with translated(f"looking up defaults of {table}"):
        rows = connection.execute(
            "SELECT attname, pg_get_expr(adbin, adrelid) FROM pg_attrdef"
            " JOIN pg_attribute ON attrelid = adrelid AND attnum = adnum WHERE adrelid = %s",
            [table.oid],
        ).fetchall()
    literals = {column: _LITERAL.match(expression) for column, expression in rows}
    found = [literals.get(column) for column in columns]
    return None if None in found else tuple(literal[1].replace("''", "'").encode() for literal in found if literal)


def of_dead_letters(connection: Connection, slot: str) -> list[tuple[str, int]]:
    """Topics that open dead letters wait for, and how many do; none where the relay keeps no state."""
    with translated("reading cdc_outbox.parked", granting(connection, READER)):
        if connection.execute("SELECT to_regclass('cdc_outbox.parked')").fetchone() == (None,):
            return []
        return connection.execute(
            "SELECT topic, count(*) FROM cdc_outbox.parked"
            " WHERE slot = %s AND state = 'dead' AND reason = 'topic_missing' GROUP BY topic ORDER BY topic",
            [slot],
        ).fetchall()
