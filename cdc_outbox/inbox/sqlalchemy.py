"""With SQLAlchemy 2: connections and sessions, sync and async; and its tables in an application's metadata."""

from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    BLANK_SCHEMA,
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    Constraint,
    DateTime,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    Uuid,
    func,
    text,
)

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
from cdc_outbox.transactions import Rows, Statement, parse_table, sqlalchemy
from cdc_outbox.transactions.sqlalchemy import AnyAsyncConnection, AnyConnection

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
    "inbox_tables",
]


class Inbox(InboxOf[AnyConnection]):
    def _run(self, connection: AnyConnection, statement: Statement, parameter: str | None) -> Rows:
        return sqlalchemy.run(connection, statement, parameter)

    def _run_alone(self, connection: AnyConnection, statement: Statement, parameter: str | None) -> Rows:
        return sqlalchemy.run_alone(connection, statement, parameter)


class AsyncInbox(AsyncInboxOf[AnyAsyncConnection]):
    async def _run(self, connection: AnyAsyncConnection, statement: Statement, parameter: str | None) -> Rows:
        return await sqlalchemy.run_async(connection, statement, parameter)

    async def _run_alone(self, connection: AnyAsyncConnection, statement: Statement, parameter: str | None) -> Rows:
        return await sqlalchemy.run_alone_async(connection, statement, parameter)


def inbox_tables(metadata: MetaData, *, table: str = "public.inbox", partitioned: bool = False) -> tuple[Table, ...]:
    """The tables, as sql/inbox/ makes them, in an application's metadata: Alembic's autogenerate then finds them.

    The inbox is the first. Of a partitioned one the partitions are not among them: run
    ``cdc_outbox.inbox.schema.sql(partitioned=True)``, or your own tool for that, besides.
    """
    schema, name = parse_table(table)
    schema_name = BLANK_SCHEMA if schema == "public" else schema  # as Alembic knows the default one

    def make(suffix: str, *parts: Column[Any] | Constraint | Index, **options: Any) -> Table:
        return Table(f"{name}{suffix}", metadata, *parts, schema=schema_name, **options)

    return (
        make(
            "",
            *_message_key(),
            Column("committed_at", DateTime(timezone=True), primary_key=partitioned, nullable=not partitioned),
            _moment("processed_at"),
            Index(f"{name}_processed_at_idx", "processed_at", postgresql_using="brin"),
            postgresql_partition_by="RANGE (committed_at)" if partitioned else None,
        ),
        make(
            "_parked",
            Column("place", BigInteger, Identity(always=False), nullable=False),
            *_message_key(),
            Column("committed_at", DateTime(timezone=True)),
            Column("lane", Uuid),
            Column("topic", Text, nullable=False, server_default=""),
            Column("partition", Integer),
            Column("offset", BigInteger),
            Column("key", LargeBinary),
            Column("value", LargeBinary),
            Column("details", JSON, nullable=False),
            Column("state", Text, nullable=False),
            Column("error", Text),
            Column("attempts", Integer, nullable=False),
            *(_moment(moment) for moment in ("due_at", "parked_at", "changed_at")),
            CheckConstraint(_PARKED_STATES, name=f"{name}_parked_state_check"),
            Index(
                f"{name}_parked_consumer_due_at_place_idx",
                "consumer",
                "due_at",
                "place",
                postgresql_where=text("state = 'retry'"),
            ),
            Index(
                f"{name}_parked_consumer_lane_place_idx",
                "consumer",
                "lane",
                "place",
                postgresql_where=text("state = 'behind'"),
            ),
            Index(
                f"{name}_parked_consumer_lane_place_idx1",
                "consumer",
                "lane",
                "place",
                postgresql_where=text("state IN ('parked', 'retry', 'behind')"),
            ),
        ),
        make("_attempt", *_message_key(), Column("attempts", Integer, nullable=False), _moment("changed_at")),
        make(
            "_version",
            Column("consumer", Text, primary_key=True),
            Column("source", Text, primary_key=True, server_default=""),
            Column("topic", Text, primary_key=True, server_default=""),
            Column("subject", Text, primary_key=True),
            Column("version", Text(collation="C"), nullable=False),
            postgresql_with={"fillfactor": 80},
        ),
        make(
            "_request",
            Column("scope", Text, primary_key=True),
            Column("key", Text, primary_key=True),
            Column("request_hash", Text, nullable=False),
            Column("response_kind", Text),
            Column("response", LargeBinary),
            _moment("changed_at"),
            Index(f"{name}_request_changed_at_idx", "changed_at", postgresql_using="brin"),
        ),
    )


_PARKED_STATES: Final = "state IN ('retry', 'parked', 'behind', 'handled', 'discarded')"


def _message_key() -> tuple[Column[str], Column[str], Column[str]]:
    return (
        Column("consumer", Text, primary_key=True),
        Column("source", Text, primary_key=True, server_default=""),
        Column("message_id", Text, primary_key=True),
    )


def _moment(name: str) -> Column[datetime]:
    return Column(name, DateTime(timezone=True), nullable=False, server_default=func.now())
