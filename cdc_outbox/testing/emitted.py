"""Was the event emitted? Reads the outbox through the test's own connection, and so sees what is not committed yet."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from cdc_outbox.outbox.table import OutboxTable
from cdc_outbox.transactions import Rows

if TYPE_CHECKING:
    import psycopg
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.utils.connection import ConnectionProxy

    from cdc_outbox.transactions import asyncpg, dbapi, sqlalchemy

    AnyConnection = (
        psycopg.Connection[Any]
        | sqlalchemy.AnyConnection
        | BaseDatabaseWrapper
        | ConnectionProxy[Any]
        | dbapi.Connection
    )
    AnyAsyncConnection = psycopg.AsyncConnection[Any] | sqlalchemy.AnyAsyncConnection | asyncpg.Connection

#: What is of none of these is taken for a DB-API driver's.
_PACKAGES: Final = {"psycopg", "sqlalchemy", "django", "asyncpg"}
_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Emitted:
    """A row of the outbox, as text; ``payload`` is parsed if it is JSON."""

    id: str
    event_type: str
    aggregate_id: str
    aggregate_type: str | None
    payload: Any
    headers: Mapping[str, str]

    def __str__(self) -> str:
        headers = f" {dict(self.headers)}" if self.headers else ""
        return f"{self.event_type} {self.aggregate_id} {self.payload!r}{headers}"


@dataclass(frozen=True, slots=True)
class _Wanted:
    event_type: str
    aggregate_id: str | None
    payload: Any
    headers: Mapping[str, str]
    count: int | None

    def matches(self, emitted: Emitted) -> bool:
        return (
            emitted.event_type == self.event_type
            and self.aggregate_id in (None, emitted.aggregate_id)
            and (self.payload is ... or self.payload == emitted.payload)
            and self.headers.items() <= emitted.headers.items()
        )

    def check(self, table: OutboxTable, rows: Rows) -> list[Emitted]:
        """Those that match. Raises AssertionError."""
        emitted = [_read(table, row) for row in rows]
        matching = list(filter(self.matches, emitted))
        if matching if self.count is None else len(matching) == self.count:
            return matching
        there = "\n".join(f"  {one}" for one in emitted[-_SHOWN:])
        raise AssertionError(
            f"{len(matching) or 'no'} event{'s' * (len(matching) != 1)} {self}"
            f"{'' if self.count is None else f', not {self.count},'} in {table.name}; "
            + (f"the last of the {len(emitted)} there:\n{there}" if emitted else "it is empty")
        )

    def __str__(self) -> str:
        parts = [repr(self.event_type)]
        if self.aggregate_id is not None:
            parts.append(f"of aggregate {self.aggregate_id!r}")
        if self.payload is not ...:
            parts.append(f"with payload {self.payload!r}")
        if self.headers:
            parts.append(f"with headers {dict(self.headers)!r}")
        return " ".join(parts)


def assert_emitted(
    connection: "AnyConnection",
    event_type: str,
    *,
    aggregate_id: str | None = None,
    payload: Any = ...,
    headers: Mapping[str, str] | None = None,
    count: int | None = None,
    outbox: OutboxTable | None = None,
) -> list[Emitted]:
    """At least one event of ``event_type`` was emitted, or exactly ``count``; returns those.

    ``connection`` is the one that emitted: psycopg's, SQLAlchemy's connection or session, ``django.db.connection``, any
    DB-API driver's. It need not have committed. ``aggregate_id`` and ``payload`` must be equal where given (None is a
    tombstone's), ``headers`` must be among the event's. All rows of the table are looked at, those of earlier tests too
    unless they were rolled back. ``outbox`` is the application's own, where its table is not the default one.
    Raises AssertionError, which lists what is there.
    """
    table = outbox or OutboxTable()
    module = _module(connection)
    if any(ancestor.__name__.lower().startswith("async") for ancestor in type(connection).__mro__) or not hasattr(
        module, "read"
    ):
        raise TypeError("this connection is asynchronous: await assert_emitted_async(...)")
    own = getattr(connection, "alias", connection) if module.__name__.endswith(".django") else connection
    rows = module.read(own, table.read_emitted(), None)
    return _Wanted(event_type, aggregate_id, payload, headers or {}, count).check(table, rows)


async def assert_emitted_async(
    connection: "AnyAsyncConnection",
    event_type: str,
    *,
    aggregate_id: str | None = None,
    payload: Any = ...,
    headers: Mapping[str, str] | None = None,
    count: int | None = None,
    outbox: OutboxTable | None = None,
) -> list[Emitted]:
    """As ``assert_emitted``, for the connections of psycopg, SQLAlchemy and asyncpg that are awaited."""
    table = outbox or OutboxTable()
    rows = await _module(connection).read_async(connection, table.read_emitted(), None)
    return _Wanted(event_type, aggregate_id, payload, headers or {}, count).check(table, rows)


def _module(connection: object) -> Any:
    """That of ``cdc_outbox.transactions`` for the package that the connection's class, or an ancestor, is from."""
    packages = [ancestor.__module__.partition(".")[0] for ancestor in type(connection).__mro__]
    name = next((package for package in packages if package in _PACKAGES), "dbapi")
    return import_module(f"cdc_outbox.transactions.{name}")


def _read(table: OutboxTable, row: tuple[str | None, ...]) -> Emitted:
    event_id, event_type, aggregate_id, aggregate_type, payload, headers = row
    return Emitted(
        event_id or "",
        event_type or "",
        aggregate_id or "",
        aggregate_type,
        None if payload is None else table.parse_payload(payload),
        json.loads(headers) if headers else {},
    )
