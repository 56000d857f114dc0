"""``emit`` with asyncpg."""

from collections.abc import Iterable
from uuid import UUID

from cdc_outbox.outbox import Event, EventRefused, NoTransaction
from cdc_outbox.outbox.table import OutboxTable
from cdc_outbox.transactions.asyncpg import Connection, run_async

__all__ = ["AsyncOutbox", "Event", "EventRefused", "NoTransaction"]


class AsyncOutbox(OutboxTable):
    """Writes events into the caller's transaction. Has no connection and no state: make one and keep it."""

    async def emit(self, connection: Connection, event: Event) -> UUID:
        """Write one event; returns its id. Raises EventRefused, NoTransaction, and what the driver raises."""
        return (await self.emit_many(connection, [event]))[0]

    async def emit_many(self, connection: Connection, events: Iterable[Event]) -> list[UUID]:
        """Write all of them or, if one is refused, none; returns their ids. Raises as ``emit`` does."""
        rows = self.rows(events)
        for text in rows.texts:
            await run_async(connection, self.statement, text)
        return rows.ids
