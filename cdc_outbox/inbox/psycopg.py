"""The inbox with psycopg 3."""

from typing import Any

from psycopg import AsyncConnection, Connection

from cdc_outbox.inbox import (
    IdempotencyKeyReused,
    InProgress,
    Message,
    NoMessageId,
    NotParked,
    NoTransaction,
    OpenTransaction,
)
from cdc_outbox.inbox.any_driver import AsyncInboxOf, AsyncRequest, InboxOf, Request
from cdc_outbox.transactions import Rows, Statement, psycopg

__all__ = [
    "AsyncInbox",
    "AsyncRequest",
    "IdempotencyKeyReused",
    "InProgress",
    "Inbox",
    "Message",
    "NoMessageId",
    "NoTransaction",
    "NotParked",
    "OpenTransaction",
    "Request",
]


class Inbox(InboxOf[Connection[Any]]):
    def _run(self, connection: Connection[Any], statement: Statement, parameter: str | None) -> Rows:
        return psycopg.run(connection, statement, parameter)

    def _run_alone(self, connection: Connection[Any], statement: Statement, parameter: str | None) -> Rows:
        return psycopg.run_alone(connection, statement, parameter)


class AsyncInbox(AsyncInboxOf[AsyncConnection[Any]]):
    async def _run(self, connection: AsyncConnection[Any], statement: Statement, parameter: str | None) -> Rows:
        return await psycopg.run_async(connection, statement, parameter)

    async def _run_alone(self, connection: AsyncConnection[Any], statement: Statement, parameter: str | None) -> Rows:
        return await psycopg.run_alone_async(connection, statement, parameter)
