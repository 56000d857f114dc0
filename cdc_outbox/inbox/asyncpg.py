"""The inbox with asyncpg."""

from cdc_outbox.inbox import (
    IdempotencyKeyReused,
    InProgress,
    Message,
    NoMessageId,
    NotParked,
    NoTransaction,
    OpenTransaction,
)
from cdc_outbox.inbox.any_driver import AsyncInboxOf, AsyncRequest
from cdc_outbox.transactions import Rows, Statement, asyncpg

__all__ = [
    "AsyncInbox",
    "AsyncRequest",
    "IdempotencyKeyReused",
    "InProgress",
    "Message",
    "NoMessageId",
    "NoTransaction",
    "NotParked",
    "OpenTransaction",
]


class AsyncInbox(AsyncInboxOf[asyncpg.Connection]):
    async def _run(self, connection: asyncpg.Connection, statement: Statement, parameter: str | None) -> Rows:
        return await asyncpg.run_async(connection, statement, parameter)

    async def _run_alone(self, connection: asyncpg.Connection, statement: Statement, parameter: str | None) -> Rows:
        return await asyncpg.run_alone_async(connection, statement, parameter)
