"""Parked events as the relay writes them, and what came of requests about them: cdc_outbox.parked and .outcome.

Over the relay's own connection; it has no right to what operators write (sql/0004_requests.sql). What operators ask is
in `operations.dead_letters`.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from cdc_outbox.journal import outcomes
from cdc_outbox.postgres.connection import BoundedConnection, Connection, granting, translated
from cdc_outbox.wal.lsn import LSN

Row = dict[str, Any]


def put(connection: BoundedConnection, columns: Row) -> bool:
    """Keep an event; durable when it returns. False if it is there already: its identity is unique.

    It never fails on what the event is: text that this database cannot hold is kept escaped, and a large one is given
    the time that it takes.
    """
    with translated("writing to cdc_outbox.parked"), _patience(connection, [columns]):
        try:
            return connection.execute(_insert(columns), columns).rowcount == 1
        except psycopg.DataError:
            escaped = {name: _escaped(value) for name, value in columns.items()}
            return connection.execute(_insert(columns), escaped).rowcount == 1


def put_all(connection: BoundedConnection, rows: Sequence[Row]) -> None:
    """As ``put``, all in one transaction; rows have the same columns."""
    with translated("writing to cdc_outbox.parked"), _patience(connection, rows):
        try:
            with connection.transaction():
                connection.cursor().executemany(_insert(rows[0]), rows)
        except psycopg.DataError:
            for row in rows:
                put(connection, row)


def _insert(columns: Row) -> sql.Composed:
    return sql.SQL(
        "INSERT INTO cdc_outbox.parked ({}) VALUES ({})"
        " ON CONFLICT (system_identifier, slot, commit_lsn, ordinal) DO NOTHING"
    ).format(
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(", ").join(map(sql.Placeholder, columns)),
    )


def _patience(connection: BoundedConnection, rows: Sequence[Row]) -> AbstractContextManager[None]:
    megabytes = sum(len(row["payload"] or b"") for row in rows) // 1_000_000
    return connection.allowing(seconds=5 + megabytes) if megabytes else nullcontext()


def _escaped(value: Any) -> Any:
    return value.encode("ascii", "backslashreplace").decode().replace("\0", "\\0") if isinstance(value, str) else value


def settled_since(connection: Connection, system_identifier: str, slot: str, lsn: LSN) -> dict[int, set[int]]:
    """Ordinals by commit LSN, of those that the slot may send once more. They may be millions: ranges are fetched."""
    with translated("reading cdc_outbox.parked"):
        rows = connection.execute(
            "SELECT commit_lsn::text, array(SELECT ARRAY[lower(each), upper(each)] FROM unnest(ordinals) AS each)"
            " FROM (SELECT commit_lsn, range_agg(int4range(ordinal, ordinal, '[]')) AS ordinals FROM cdc_outbox.parked"
            " WHERE system_identifier = %s AND slot = %s AND commit_lsn >= %s::pg_lsn GROUP BY commit_lsn) AS settled",
            [system_identifier, slot, str(lsn)],
        ).fetchall()
    return {
        LSN.parse(commit_lsn): {ordinal for first, end in ranges for ordinal in range(first, end)}
        for commit_lsn, ranges in rows
    }


def to_redrive(connection: Connection, dead_letter_id: int) -> Row | None:
    """What the relay needs to publish it again. Of its own table only: it has no right to that of the requests."""
    with translated("reading cdc_outbox.parked", granting(connection, "SELECT ON cdc_outbox.parked")):
        cursor = connection.cursor(row_factory=dict_row)
        return cursor.execute(
            "SELECT state, event_id, aggregate_type, event_type, topic, key, headers, payload FROM cdc_outbox.parked"
            " WHERE id = %s",
            [dead_letter_id],
        ).fetchone()


def redriven(connection: Connection, requests: Mapping[int, int]) -> None:
    """Kafka has acknowledged what these requests (id to dead letter) asked for."""
    with translated("recording a redrive"), connection.transaction():
        outcomes.record(connection, dict(requests), "redriven")
        connection.execute(
            "UPDATE cdc_outbox.parked SET state = 'redriven', note = NULL, state_changed_at = now(),"
            " state_changed_by = current_user WHERE id = ANY(%s)",
            [list(requests.values())],
        )


def refused_again(connection: Connection, request_id: int, dead_letter_id: int, *, reason: str, detail: str) -> None:
    with translated("recording a refused redrive"), connection.transaction():
        outcomes.record(connection, {request_id: dead_letter_id}, "refused", detail)
        connection.execute(
            "UPDATE cdc_outbox.parked SET attempts = attempts + 1, reason = %s, detail = %s,"
            " state_changed_at = now(), state_changed_by = current_user WHERE id = %s AND state = 'dead'",
            [reason, detail, dead_letter_id],
        )
