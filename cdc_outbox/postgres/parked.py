"""A consumer's parked messages, as an operator sees them, and what is decided about them.

In the consumer's database. Over any connection that may SELECT and UPDATE them (sql/inbox/parked.sql).
"""

import json
from typing import Any, Final

from psycopg import sql
from psycopg.rows import dict_row

from cdc_outbox.errors import CheckFailed, ConfigurationError
from cdc_outbox.inbox.psycopg import Inbox, NotParked
from cdc_outbox.inbox.table import beside
from cdc_outbox.postgres.connection import Connection, translated

Row = dict[str, Any]

#: In the order in which a person would read them.
_SUMMARY: Final = """
    consumer, message_id, source, state, topic, partition, "offset", key, attempts, error, committed_at, parked_at,
    changed_at, CASE WHEN state IN ('parked', 'retry')
                     THEN (SELECT count(*) FROM {table} AS one WHERE one.consumer = parked.consumer
                                                                AND one.lane = parked.lane AND one.state = 'behind')
                     ELSE 0 END AS behind"""
_HINTS: Final = {"42P01": "`cdc-outbox migrate inbox up` makes it; --table names another inbox"}


def find(connection: Connection, inbox: str, *, consumer: str | None, all_too: bool) -> list[Row]:
    """Those that wait for a decision or are being tried again, in the order in which they came; ``all_too``: all."""
    states = ["parked", "retry"] + (["behind", "handled", "discarded"] if all_too else [])
    return _select(
        connection,
        inbox,
        _SUMMARY,
        "state = ANY (%s) AND (%s::text IS NULL OR consumer = %s)",
        states,
        consumer,
        consumer,
    )


def get(connection: Connection, inbox: str, message_id: str, *, consumer: str | None) -> Row:
    """With its value and headers. Raises ConfigurationError if there is none, or more than one."""
    row = _only(connection, inbox, message_id, consumer, f"{_SUMMARY}, value, details")
    details = json.loads(row.pop("details")) if isinstance(row["details"], str) else row.pop("details")
    return {**row, "type": details["type"], "headers": details["headers"]}


def unpark(connection: Connection, inbox: str, message_id: str, *, consumer: str | None) -> Row:
    """Ask for it to be tried again; returns it. Raises ConfigurationError, CheckFailed if it is not parked."""
    return _decide(connection, inbox, message_id, consumer, Inbox.unpark)


def discard(connection: Connection, inbox: str, message_id: str, *, consumer: str | None) -> Row:
    """Give it up; returns it. Raises ConfigurationError, CheckFailed if it is not parked."""
    return _decide(connection, inbox, message_id, consumer, Inbox.discard)


def _decide(connection: Connection, inbox: str, message_id: str, consumer: str | None, verb: Any) -> Row:
    row = _only(connection, inbox, message_id, consumer, _SUMMARY)
    if row["state"] == "retry" and verb is Inbox.unpark:
        return row  # somebody has asked for it already
    with translated(f"deciding about message {message_id!r}", _HINTS), connection.transaction():
        try:
            verb(Inbox(row["consumer"], table=inbox), connection, message_id, source=row["source"])
        except NotParked as error:
            raise CheckFailed(str(error)) from error
    return row


def _only(connection: Connection, inbox: str, message_id: str, consumer: str | None, columns: str) -> Row:
    condition = "message_id = %s AND (%s::text IS NULL OR consumer = %s)"
    rows = _select(connection, inbox, columns, condition, message_id, consumer, consumer)
    if not rows:
        raise ConfigurationError(
            f"no message {message_id!r} was ever parked" + (f" of consumer {consumer!r}" if consumer else ""),
            hint="`cdc-outbox inbox list --all` shows all that were",
        )
    if len(rows) > 1:
        names = ", ".join(sorted({row["consumer"] for row in rows}))
        raise ConfigurationError(f"several consumers have message {message_id!r}: {names}", hint="name one: --consumer")
    return rows[0]


def _select(connection: Connection, inbox: str, columns: str, condition: str, *parameters: Any) -> list[Row]:
    table = beside(inbox, "parked")
    text = f"SELECT {columns} FROM {{table}} AS parked WHERE {condition} ORDER BY place"  # noqa: S608 - constants of ours
    query = sql.SQL(text).format(table=sql.SQL(table))
    with translated(f"reading table {table}", _HINTS), connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, parameters).fetchall()
