"""``emit`` with SQLAlchemy 2: connections and sessions, sync and async."""

from collections.abc import Iterable
from uuid import UUID

from cdc_outbox.outbox import Event, EventRefused, NoTransaction
from cdc_outbox.outbox.table import OutboxTable
from cdc_outbox.transactions.sqlalchemy import AnyAsyncConnection, AnyConnection, run, run_async

__all__ = ["AsyncOutbox", "Event", "EventRefused", "NoTransaction", "Outbox"]


class Outbox(OutboxTable):
    """Writes events into the caller's transaction. Has no connection and no state: make one and keep it."""

    def emit(self, connection: AnyConnection, event: Event) -> UUID:
        """Write one event; returns its id. Raises EventRefused, NoTransaction, and what the driver raises."""
        return self.emit_many(connection, [event])[0]

    def emit_many(self, connection: AnyConnection, events: Iterable[Event]) -> list[UUID]:
        """Write all of them or, if one is refused, none; returns their ids. Raises as ``emit`` does."""
        rows = self.rows(events)
        for text in rows.texts:
            run(connection, self.statement, text)
        return rows.ids


class AsyncOutbox(OutboxTable):
    """Writes events into the caller's transaction. Has no connection and no state: make one and keep it."""

    async def emit(self, connection: AnyAsyncConnection, event: Event) -> UUID:
        """Write one event; returns its id. Raises EventRefused, NoTransaction, and what the driver raises."""
        return (await self.emit_many(connection, [event]))[0]

    async def emit_many(self, connection: AnyAsyncConnection, events: Iterable[Event]) -> list[UUID]:
        """Write all of them or, if one is refused, none; returns their ids. Raises as ``emit`` does."""
        rows = self.rows(events)
        for text in rows.texts:
            await run_async(connection, self.statement, text)
        return rows.ids
