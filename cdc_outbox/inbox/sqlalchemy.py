"""``once`` with SQLAlchemy 2: connections and sessions, sync and async; and its table in an application's metadata."""

from sqlalchemy import BLANK_SCHEMA, Column, DateTime, Index, MetaData, Table, Text, func

from cdc_outbox.inbox import Message, NoMessageId, NoTransaction, OpenTransaction
from cdc_outbox.inbox.once import AsyncInboxOf, InboxOf
from cdc_outbox.transactions import Rows, Statement, parse_table, sqlalchemy
from cdc_outbox.transactions.sqlalchemy import AnyAsyncConnection, AnyConnection

__all__ = ["AsyncInbox", "Inbox", "Message", "NoMessageId", "NoTransaction", "OpenTransaction", "inbox_tables"]


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

    Of a partitioned one the partitions are not among them: run ``cdc_outbox.inbox.schema.sql(partitioned=True)``, or
    your own tool for that, besides.
    """
    schema, name = parse_table(table)
    inbox = Table(
        name,
        metadata,
        Column("consumer", Text, primary_key=True),
        Column("source", Text, primary_key=True, server_default=""),
        Column("message_id", Text, primary_key=True),
        Column("committed_at", DateTime(timezone=True), primary_key=partitioned, nullable=not partitioned),
        Column("processed_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
        Index(f"{name}_processed_at_idx", "processed_at", postgresql_using="brin"),
        schema=BLANK_SCHEMA if schema == "public" else schema,  # as Alembic knows the default one
        postgresql_partition_by="RANGE (committed_at)" if partitioned else None,
    )
    return (inbox,)
