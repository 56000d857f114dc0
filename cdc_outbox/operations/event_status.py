"""What is known of the outbox's rows: which are published, which are stuck, of how many it cannot be told.

Asked by operators, from the notes that the relay has left (settlement.py); view cdc_outbox.event_status says it of each
row (sql/0007_event_status.sql). Needs SELECT in schema cdc_outbox, and on the outbox where its rows are counted.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from psycopg import sql

from cdc_outbox.config import ColumnsConfig
from cdc_outbox.postgres.catalog import Table
from cdc_outbox.postgres.connection import MIGRATE_HINT, READER, Connection, encoding_of, granting, translated

#: More rows than this nobody reads; the count says how many there are.
_MOST_STUCK_SHOWN: Final = 100
#: Of a column of ``event``: text that may be none, see `encodings`.
_AS_STORED: Final = sql.SQL("convert_to(event.{}::text, getdatabaseencoding()::name)")
#: The outbox is not what it was when the view was made.
_VIEW_HINTS: Final = dict.fromkeys(("42P01", "42703", "42P13", "42804"), MIGRATE_HINT)
#: date, timestamp, timestamptz (pg_type.dat): of another type, created_at may count anything from anywhere
_TIMES: Final = frozenset({1082, 1114, 1184})


def known_published(connection: Connection, slot: str, *, for_at_least: timedelta) -> dict[int, str]:
    """By the OID of each heap the transactions, an int8multirange, whose rows are published, or dead, for so long."""
    rights = granting(connection, READER)
    with translated("reading cdc_outbox.settled", rights):
        rows = connection.execute(
            """
            SELECT heap::int8, range_agg(int8range(since, before))::text
              FROM (SELECT heap, pg_snapshot_xmax(since)::text::bigint AS since,
                           greatest(CASE WHEN complete THEN pg_snapshot_xmin(snapshot)::text::bigint END,
                                    pg_snapshot_xmin(earlier)::text::bigint) AS before
                      FROM cdc_outbox.settled AS note JOIN cdc_outbox.coverage ON coverage.id = note.coverage
                      JOIN pg_class ON pg_class.oid = heap AND (complete OR relfilenode = file)
                     WHERE slot = %s AND settled_at <= now() - %s
                       AND system_identifier = (SELECT system_identifier::text FROM pg_control_system())) AS told
             WHERE before > since
             GROUP BY heap
            """,
            [slot, for_at_least],
        ).fetchall()
    return dict(rows)


@dataclass(frozen=True, slots=True)
class StuckRow:
    outbox_id: str
    aggregate_id: str
    event_type: str
    seconds: float | None
    """Since it was committed, or created where the server does not track that; None if the table does not tell."""


def commit_time(connection: Connection, table: Table) -> sql.Composable:
    """When a row, ``event``, was committed; created where the server does not track that; NULL if neither is known."""
    with translated("reading track_commit_timestamp"):
        tracked = connection.execute("SELECT current_setting('track_commit_timestamp')::bool").fetchone() == (True,)
    if tracked:
        return sql.SQL("pg_xact_commit_timestamp(event.xmin)")
    if table.columns.get("created_at") in _TIMES:
        return sql.SQL("event.created_at::timestamptz")
    return sql.SQL("NULL::timestamptz")


def stuck_rows(
    connection: Connection, table: Table, columns: ColumnsConfig, slot: str, *, patience: timedelta
) -> tuple[int, list[StuckRow]]:
    """Rows committed longer ago than ``patience`` that the relay should have settled and has not: how many, and the
    oldest of them.

    Rows of which it cannot be told, and those that became dead letters, are not stuck. Needs SELECT on the table.
    """
    names = {field: sql.Identifier(column) for field, column in columns.of(table.columns).items()}
    rights = granting(connection, READER, f"SELECT ON {table.identifier.as_string()}", schema=table.namespace)
    with translated(f"looking for stuck rows in {table}", rights):
        committed = commit_time(connection, table)
        rows = connection.execute(
            sql.SQL(
                """
                WITH latest AS (
                    SELECT pg_snapshot_xmin(snapshot) AS before, coverage, taken_at
                      FROM cdc_outbox.settled
                     WHERE slot = {slot}
                       AND system_identifier = (SELECT system_identifier::text FROM pg_control_system())
                     ORDER BY pg_snapshot_xmax(snapshot) DESC, id DESC LIMIT 1)
                SELECT count(*) OVER (), {shown_id}, {shown_aggregate_id}, {shown_event_type},
                       extract(epoch FROM now() - {committed})::float8
                  FROM latest JOIN cdc_outbox.coverage AS covered ON covered.id = latest.coverage
                  JOIN {table} AS event ON event.tableoid = covered.heap
                 WHERE latest.taken_at < now() - {patience}
                   AND coalesce({committed} < now() - {patience}, true)
                   AND cdc_outbox.full_xid(event.xmin) >= latest.before
                   AND cdc_outbox.full_xid(event.xmin) >= pg_snapshot_xmax(covered.since)
                   AND NOT EXISTS (SELECT FROM cdc_outbox.parked
                                    WHERE event_id = pg_catalog.format('%s', event.{id}) AND slot = {slot})
                 ORDER BY {committed} NULLS FIRST
                 LIMIT {most}
                """
            ).format(
                slot=slot,
                table=table.identifier,
                committed=committed,
                patience=sql.SQL("{}::interval").format(patience),
                most=_MOST_STUCK_SHOWN,
                id=names["id"],
                **{f"shown_{field}": _AS_STORED.format(names[field]) for field in ("id", "aggregate_id", "event_type")},
            )
        ).fetchall()
    encoding = encoding_of(connection)

    def text(stored: bytes | None) -> str:
        return encoding.text(stored or b"")

    stuck = [StuckRow(text(event), text(aggregate), text(kind), seconds) for _, event, aggregate, kind, seconds in rows]
    return (rows[0][0] if rows else 0), stuck


def count_unknown(connection: Connection, slot: str) -> int | None:
    """Rows of which it cannot be told whether they were published; None if there is no view that would know.

    Raises OperatorNeeded if an outbox has changed since the view was made.
    """
    with translated("reading cdc_outbox.event_status", {**_VIEW_HINTS, **granting(connection, READER)}):
        if connection.execute("SELECT to_regclass('cdc_outbox.event_status')").fetchone() == (None,):
            return None
        row = connection.execute(
            "SELECT count(*) FROM cdc_outbox.event_status WHERE slot = %s AND state = 'unknown'", [slot]
        ).fetchone()
    return row[0] if row else None
