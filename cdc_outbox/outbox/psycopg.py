"""``emit`` with psycopg 3."""

from typing import Any

from psycopg import AsyncConnection, Connection

from cdc_outbox.outbox import Event, EventRefused, NoTransaction
from cdc_outbox.outbox.emit import AsyncOutboxOf, OutboxOf
from cdc_outbox.transactions import Rows, Statement, psycopg

__all__ = ["AsyncOutbox", "Event", "EventRefused", "NoTransaction", "Outbox"]


class Outbox(OutboxOf[Connection[Any]]):
    def _run(self, connection: Connection[Any], statement: Statement, parameter: str) -> Rows:
        return psycopg.run(connection, statement, parameter)


class AsyncOutbox(AsyncOutboxOf[AsyncConnection[Any]]):
    async def _run(self, connection: AsyncConnection[Any], statement: Statement, parameter: str) -> Rows:
        return await psycopg.run_async(connection, statement, parameter)
