"""Installing a consumer's inbox: the tables of sql/inbox/, and of a partitioned one the coming days' partitions."""

from collections.abc import Callable, Iterable
from typing import Final

from cdc_outbox.errors import OperatorNeeded
from cdc_outbox.inbox import schema
from cdc_outbox.inbox.table import beside
from cdc_outbox.postgres.connection import Connection, translated
from cdc_outbox.transactions import quoted_table

_HINTS: Final = {"3F000": "make the schema first, or name another with --table"}
#: What tells the table, and those beside it, from others of the same name.
_COLUMNS: Final = {
    "": {"consumer", "source", "message_id", "committed_at", "processed_at"},
    "parked": {"place", "consumer", "source", "message_id", "lane", "details", "state", "attempts", "due_at"},
    "attempt": {"consumer", "source", "message_id", "attempts", "changed_at"},
    "version": {"consumer", "source", "topic", "subject", "version"},
    "request": {"scope", "key", "request_hash", "response_kind", "response", "changed_at"},
}


def up(connection: Connection, table: str, *, partitioned: bool, report: Callable[[str], None]) -> None:
    """Make what is missing; idempotent. Raises OperatorNeeded, ValueError if ``table`` is no name."""
    name = quoted_table(table)
    with translated(f"making table {name}", _HINTS), connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [name])  # as the script does
        names = {name: _COLUMNS[""], **{beside(table, other): _COLUMNS[other] for other in schema.BESIDE}}
        before = _relations(connection, names)
        for known, columns in names.items():
            _check_columns(connection, known, columns)
        _check_key(connection, name, partitioned=partitioned)
        connection.execute(schema.sql(table, partitioned=partitioned).encode())
        for made in sorted(_relations(connection, names) - before):
            report(f"make table {made}")


def _check_columns(connection: Connection, name: str, columns: set[str]) -> None:
    """Of what is there already under that name. Raises OperatorNeeded."""
    rows = connection.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped", [name]
    ).fetchall()
    if rows and (missing := columns - {column for (column,) in rows}):
        raise OperatorNeeded(
            f"table {name} is there, and it is not the inbox's: it has no column {min(missing)!r}",
            hint="name another inbox with --table, and in the consumers with Inbox(..., table=)",
        )


def _check_key(connection: Connection, name: str, *, partitioned: bool) -> None:
    """Of an inbox that is there already. Raises OperatorNeeded."""
    row = connection.execute("SELECT relkind = 'p' FROM pg_class WHERE oid = to_regclass(%s)", [name]).fetchone()
    if row is None:
        return
    if row != (partitioned,):
        raise OperatorNeeded(
            f"table {name} is there, and it is {'not ' if partitioned else ''}partitioned",
            hint="leave out --partitioned" if partitioned else "add --partitioned",
        )
    key = ["consumer", "source", "message_id", *(["committed_at"] if partitioned else [])]
    keys = connection.execute(
        "SELECT array_agg(attname::text) FROM pg_index"
        " JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY (indkey)"
        " WHERE indrelid = to_regclass(%s) AND indisunique AND indpred IS NULL GROUP BY indexrelid",
        [name],
    ).fetchall()
    if sorted(key) not in [sorted(columns) for (columns,) in keys]:
        raise OperatorNeeded(
            f"table {name} is there, and has no unique key ({', '.join(key)})",
            hint=f"ALTER TABLE {name} ADD PRIMARY KEY ({', '.join(key)})",
        )


def _relations(connection: Connection, names: Iterable[str]) -> set[str]:
    """The tables and their partitions."""
    rows = connection.execute(
        "SELECT to_regclass(name)::text FROM unnest(%(names)s::text[]) AS name WHERE to_regclass(name) IS NOT NULL"
        " UNION SELECT relid::text FROM unnest(%(names)s::text[]) AS name, pg_partition_tree(to_regclass(name))",
        {"names": list(names)},
    ).fetchall()
    return {relation for (relation,) in rows}
