"""A consumer's parked messages, as an operator sees them, and what is decided about them.

In the consumer's database. Over any connection that may SELECT and UPDATE them (sql/inbox/parked.sql).
"""

import json
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Which:
    """One message: by its id and, where that is not enough, its consumer and source. Without an id: all such."""

    message_id: str | None = None
    consumer: str | None = None
    source: str | None = None


def find(connection: Connection, inbox: str, which: Which, *, all_too: bool) -> list[Row]:
    """Those that wait for a decision or are being tried again, in the order in which they came; ``all_too``: all."""
    return _select(connection, inbox, which, _SUMMARY, "" if all_too else "AND state IN ('parked', 'retry')")


def get(connection: Connection, inbox: str, which: Which) -> Row:
    """With its value and headers. Raises ConfigurationError if there is none, or more than one."""
    row = _only(connection, inbox, which, f"{_SUMMARY}, value, details")
    given = row.pop("details")
    details = json.loads(given) if isinstance(given, str) else given
    return {**row, "type": details["type"], "headers": details["headers"]}


def unpark(connection: Connection, inbox: str, which: Which) -> Row:
    """Ask for it to be tried again; returns it. Raises ConfigurationError, CheckFailed if it is not parked."""
    row = _only(connection, inbox, which, _SUMMARY)
    if row["state"] != "retry":  # else somebody has asked for it already
        _decide(connection, inbox, row, Inbox.unpark)
    return row


def discard(connection: Connection, inbox: str, which: Which) -> Row:
    """Give it up; returns it. Raises ConfigurationError, CheckFailed if it is not parked."""
    row = _only(connection, inbox, which, _SUMMARY)
    _decide(connection, inbox, row, Inbox.discard)
    return row


def _decide(connection: Connection, inbox: str, row: Row, verb: Any) -> None:
    with translated(f"deciding about message {row['message_id']!r}", _HINTS), connection.transaction():
        try:
            verb(Inbox(row["consumer"], table=inbox), connection, row["message_id"], source=row["source"])
        except NotParked as error:
            raise CheckFailed(str(error)) from error


def _only(connection: Connection, inbox: str, which: Which, columns: str) -> Row:
    rows = _select(connection, inbox, which, columns)
    if not rows:
        raise ConfigurationError(
            f"no message {which.message_id!r} was ever parked" + (f" by {which.consumer!r}" if which.consumer else ""),
            hint="`cdc-outbox inbox list --all` shows all that were",
        )
    if len(rows) > 1:
        names = ", ".join(" ".join(filter(None, (row["consumer"], row["source"]))) for row in rows)
        raise ConfigurationError(
            f"several have message {which.message_id!r}: {names}", hint="add --consumer or --source"
        )
    return rows[0]


def _select(connection: Connection, inbox: str, which: Which, columns: str, condition: str = "") -> list[Row]:
    table = beside(inbox, "parked")
    query = sql.SQL(
        f"""SELECT {columns} FROM {{table}} AS parked
             WHERE message_id = coalesce(%s, message_id) AND consumer = coalesce(%s, consumer)
               AND source = coalesce(%s, source) {condition} ORDER BY place"""  # noqa: S608 - constants of ours
    ).format(table=sql.SQL(table))
    parameters = [which.message_id, which.consumer, which.source]
    with translated(f"reading table {table}", _HINTS), connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, parameters).fetchall()
