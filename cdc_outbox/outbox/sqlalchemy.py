"""``emit`` with SQLAlchemy 2: connections and sessions, sync and async."""

from cdc_outbox.outbox import Event, EventRefused, NoTransaction
from cdc_outbox.outbox.emit import AsyncOutboxOf, OutboxOf
from cdc_outbox.transactions import Rows, Statement, sqlalchemy

__all__ = ["AsyncOutbox", "Event", "EventRefused", "NoTransaction", "Outbox"]


class Outbox(OutboxOf[sqlalchemy.AnyConnection]):
    def _run(self, connection: sqlalchemy.AnyConnection, statement: Statement, parameter: str) -> Rows:
        return sqlalchemy.run(connection, statement, parameter)


class AsyncOutbox(AsyncOutboxOf[sqlalchemy.AnyAsyncConnection]):
    async def _run(self, connection: sqlalchemy.AnyAsyncConnection, statement: Statement, parameter: str) -> Rows:
        return await sqlalchemy.run_async(connection, statement, parameter)
