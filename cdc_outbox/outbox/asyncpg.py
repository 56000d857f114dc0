"""``emit`` with asyncpg."""

from cdc_outbox.outbox import Event, EventRefused, NoTransaction
from cdc_outbox.outbox.emit import AsyncOutboxOf
from cdc_outbox.transactions import Rows, Statement, asyncpg

__all__ = ["AsyncOutbox", "Event", "EventRefused", "NoTransaction"]


class AsyncOutbox(AsyncOutboxOf[asyncpg.Connection]):
    async def _run(self, connection: asyncpg.Connection, statement: Statement, parameter: str) -> Rows:
        return await asyncpg.run_async(connection, statement, parameter)
