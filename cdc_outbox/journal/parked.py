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

from cdc_outbox.postgres.connection import BoundedConnection, Connection, granting, translated
from cdc_outbox.wal.lsn import LSN
from cdc_outbox.wal.position import Position

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


def settled_since(connection: Connection, system_identifier: str, slot: str, lsn: LSN) -> list[Position]:
    """Of those that the slot may send once more."""
    with translated("reading cdc_outbox.parked"):
        rows = connection.execute(
            "SELECT commit_lsn::text, ordinal FROM cdc_outbox.parked"
            " WHERE system_identifier = %s AND slot = %s AND commit_lsn >= %s::pg_lsn",
            [system_identifier, slot, str(lsn)],
        ).fetchall()
    return [Position(LSN.parse(commit_lsn), ordinal) for commit_lsn, ordinal in rows]


def to_redrive(connection: Connection, dead_letter_id: int) -> Row | None:
    """What the relay needs to publish it again. Of its own table only: it has no right to that of the requests."""
    with translated("reading cdc_outbox.parked", granting(connection, "SELECT ON cdc_outbox.parked")):
        cursor = connection.cursor(row_factory=dict_row)
        return cursor.execute(
            "SELECT state, event_id, aggregate_type, event_type, topic, key, headers, payload FROM cdc_outbox.parked"
            " WHERE id = %s",
            [dead_letter_id],
        ).fetchone()


def has_outcome(connection: Connection, request_id: int) -> bool:
    with translated("reading cdc_outbox.outcome"):
        query = "SELECT FROM cdc_outbox.outcome WHERE request_id = %s"
        return connection.execute(query, [request_id]).rowcount == 1


def passed_over(connection: Connection, request_id: int, dead_letter_id: int, detail: str) -> None:
    with translated("recording that a redrive was passed over"):
        _record(connection, {request_id: dead_letter_id}, "passed over", detail)


def redriven(connection: Connection, requests: Mapping[int, int]) -> None:
    """Kafka has acknowledged what these requests (id to dead letter) asked for."""
    with translated("recording a redrive"), connection.transaction():
        _record(connection, requests, "redriven")
        connection.execute(
            "UPDATE cdc_outbox.parked SET state = 'redriven', note = NULL, state_changed_at = now(),"
            " state_changed_by = current_user WHERE id = ANY(%s)",
            [list(requests.values())],
        )


def refused_again(connection: Connection, request_id: int, dead_letter_id: int, *, reason: str, detail: str) -> None:
    with translated("recording a refused redrive"), connection.transaction():
        _record(connection, {request_id: dead_letter_id}, "refused", detail)
        connection.execute(
            "UPDATE cdc_outbox.parked SET attempts = attempts + 1, reason = %s, detail = %s,"
            " state_changed_at = now(), state_changed_by = current_user WHERE id = %s AND state = 'dead'",
            [reason, detail, dead_letter_id],
        )


def _record(connection: Connection, requests: Mapping[int, int], result: str, detail: str = "") -> None:
    connection.execute(
        "INSERT INTO cdc_outbox.outcome (request_id, parked_id, result, detail) SELECT request_id, parked_id, %s, %s"
        " FROM unnest(%s::bigint[], %s::bigint[]) AS of (request_id, parked_id) ON CONFLICT DO NOTHING",
        [result, detail, list(requests), list(requests.values())],
    )
