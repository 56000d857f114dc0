"""Installing a consumer's inbox: the table of sql/inbox/, and of a partitioned one the coming days' partitions."""

from collections.abc import Callable
from typing import Final

from cdc_outbox.errors import OperatorNeeded
from cdc_outbox.inbox import schema
from cdc_outbox.postgres.connection import Connection, translated
from cdc_outbox.transactions import quoted_table

_HINTS: Final = {"3F000": "make the schema first, or name another with --table"}
_COLUMNS: Final = {"consumer", "source", "message_id", "committed_at", "processed_at"}


def up(connection: Connection, table: str, *, partitioned: bool, report: Callable[[str], None]) -> None:
    """Make what is missing; idempotent. Raises OperatorNeeded, ValueError if ``table`` is no name."""
    name = quoted_table(table)
    with translated(f"making table {name}", _HINTS), connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [name])  # as the script does
        before = _relations(connection, name)
        if before:
            _check(connection, name, partitioned=partitioned)
        connection.execute(schema.sql(table, partitioned=partitioned).encode())
        for made in sorted(_relations(connection, name) - before):
            report(f"make table {made}")


def _check(connection: Connection, name: str, *, partitioned: bool) -> None:
    """What is there already under that name. Raises OperatorNeeded."""
    rows = connection.execute(
        "SELECT relkind = 'p', attname FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid"
        " WHERE pg_class.oid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped",
        [name],
    ).fetchall()
    if missing := _COLUMNS - {column for _, column in rows}:
        raise OperatorNeeded(
            f"table {name} is there, and it is no inbox: it has no column {min(missing)!r}",
            hint="name another with --table, and in the consumers with Inbox(..., table=)",
        )
    is_partitioned = rows[0][0]
    if is_partitioned != partitioned:
        raise OperatorNeeded(
            f"table {name} is there, and it is {'' if is_partitioned else 'not '}partitioned",
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


def _relations(connection: Connection, name: str) -> set[str]:
    """The table and its partitions."""
    rows = connection.execute(
        "SELECT pg_class.oid::regclass::text FROM pg_class WHERE pg_class.oid = to_regclass(%(name)s)"
        " UNION SELECT relid::text FROM pg_partition_tree(to_regclass(%(name)s))",
        {"name": name},
    ).fetchall()
    return {relation for (relation,) in rows}
