"""The inbox with any driver of Python's Database API (PEP 249): psycopg2, pg8000 and their like."""

from cdc_outbox.inbox import (
    IdempotencyKeyReused,
    InProgress,
    Message,
    NoMessageId,
    NotParked,
    NoTransaction,
    OpenTransaction,
)
from cdc_outbox.inbox.any_driver import InboxOf, Request
from cdc_outbox.transactions import Rows, Statement, dbapi

__all__ = [
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


class Inbox(InboxOf[dbapi.Connection]):
    def _run(self, connection: dbapi.Connection, statement: Statement, parameter: str | None) -> Rows:
        return dbapi.run(connection, statement, parameter)

    def _run_alone(self, connection: dbapi.Connection, statement: Statement, parameter: str | None) -> Rows:
        return dbapi.run_alone(connection, statement, parameter)
