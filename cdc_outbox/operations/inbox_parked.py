"""A consumer's parked messages, as an operator sees them, and what is decided about them.

In the consumer's database. Over any connection that may SELECT and UPDATE them (sql/inbox/parked.sql).
"""

import json
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Final, TypeVar

from psycopg import sql
from psycopg.rows import class_row

from cdc_outbox.errors import CheckFailed, ConfigurationError
from cdc_outbox.inbox.psycopg import Inbox, NotParked
from cdc_outbox.inbox.table import beside
from cdc_outbox.postgres.connection import Connection, translated


@dataclass(frozen=True, slots=True)
class ParkedMessage:
    """Without what it says."""

    consumer: str
    message_id: str
    source: str
    state: str
    topic: str
    partition: int | None
    offset: int | None
    key: bytes | None
    attempts: int
    error: str | None
    committed_at: datetime | None
    parked_at: datetime
    changed_at: datetime
    behind: int
    """How many wait behind it."""


@dataclass(frozen=True, slots=True)
class WholeParkedMessage(ParkedMessage):
    value: bytes | None
    type: str | None
    headers: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Stored(ParkedMessage):
    value: bytes | None
    details: Any


Message = TypeVar("Message", bound=ParkedMessage)

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


def find(connection: Connection, inbox: str, which: Which, *, all_too: bool) -> list[ParkedMessage]:
    """Those that wait for a decision or are being tried again, in the order in which they came; ``all_too``: all."""
    return _select(
        ParkedMessage, connection, inbox, which, _SUMMARY, "" if all_too else "AND state IN ('parked', 'retry')"
    )


def get(connection: Connection, inbox: str, which: Which) -> WholeParkedMessage:
    """With its value and headers. Raises ConfigurationError if there is none, or more than one."""
    stored = _only(_Stored, connection, inbox, which, f"{_SUMMARY}, value, details")
    # read here: the server would refuse characters that its encoding does not know
    details = json.loads(stored.details) if isinstance(stored.details, str) else stored.details
    summary = {field.name: getattr(stored, field.name) for field in fields(ParkedMessage)}
    return WholeParkedMessage(**summary, value=stored.value, type=details["type"], headers=details["headers"])


def unpark(connection: Connection, inbox: str, which: Which) -> ParkedMessage:
    """Ask for it to be tried again; returns it. Raises ConfigurationError, CheckFailed if it is not parked."""
    message = _only(ParkedMessage, connection, inbox, which, _SUMMARY)
    if message.state != "retry":  # else somebody has asked for it already
        _decide(connection, inbox, message, Inbox.unpark)
    return message


def discard(connection: Connection, inbox: str, which: Which) -> ParkedMessage:
    """Give it up; returns it. Raises ConfigurationError, CheckFailed if it is not parked."""
    message = _only(ParkedMessage, connection, inbox, which, _SUMMARY)
    _decide(connection, inbox, message, Inbox.discard)
    return message


def _decide(connection: Connection, inbox: str, message: ParkedMessage, verb: Any) -> None:
    with translated(f"deciding about message {message.message_id!r}", _HINTS), connection.transaction():
        try:
            verb(Inbox(message.consumer, table=inbox), connection, message.message_id, source=message.source)
        except NotParked as error:
            raise CheckFailed(str(error)) from error


def _only(kind: type[Message], connection: Connection, inbox: str, which: Which, columns: str) -> Message:
    messages = _select(kind, connection, inbox, which, columns)
    if not messages:
        raise ConfigurationError(
            f"no message {which.message_id!r} was ever parked" + (f" by {which.consumer!r}" if which.consumer else ""),
            hint="`cdc-outbox inbox list --all` shows all that were",
        )
    if len(messages) > 1:
        names = ", ".join(" ".join(filter(None, (each.consumer, each.source))) for each in messages)
        raise ConfigurationError(
            f"several have message {which.message_id!r}: {names}", hint="add --consumer or --source"
        )
    return messages[0]


def _select(
    kind: type[Message], connection: Connection, inbox: str, which: Which, columns: str, condition: str = ""
) -> list[Message]:
    table = beside(inbox, "parked")
    query = sql.SQL(
        f"""SELECT {columns} FROM {{table}} AS parked
             WHERE message_id = coalesce(%s, message_id) AND consumer = coalesce(%s, consumer)
               AND source = coalesce(%s, source) {condition} ORDER BY place"""  # noqa: S608 - constants of ours
    ).format(table=sql.SQL(table))
    parameters = [which.message_id, which.consumer, which.source]
    with translated(f"reading table {table}", _HINTS), connection.cursor(row_factory=class_row(kind)) as cursor:
        return cursor.execute(query, parameters).fetchall()
