"""SQLAlchemy 2, Core and ORM, on any of its PostgreSQL drivers.

Its connections and sessions begin a transaction with the first statement, unless their isolation level is AUTOCOMMIT.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import Connection, TextClause, text
from sqlalchemy.orm import Session, scoped_session

from cdc_outbox.transactions import NoTransaction, OpenTransaction, Rows, Statement

if TYPE_CHECKING:  # importing it asks for greenlet, which who writes no asynchronous code need not have
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session

AnyConnection: TypeAlias = Connection | Session | scoped_session[Any]
AnyAsyncConnection: TypeAlias = "AsyncConnection | AsyncSession | async_scoped_session[Any]"


def run(connection: AnyConnection, statement: Statement, parameter: str | None) -> Rows:
    """In the caller's transaction. Raises NoTransaction."""
    own = connection if isinstance(connection, Connection) else connection.connection()
    if getattr(own.connection.dbapi_connection, "autocommit", False):
        raise NoTransaction("give the change a connection whose isolation_level is not AUTOCOMMIT")
    return read(own, statement, parameter)


def read(connection: AnyConnection, statement: Statement, parameter: str | None) -> Rows:
    """In a transaction or not."""
    parameters = None if parameter is None else {"rows": parameter}
    result = connection.execute(_clause(statement), parameters)
    return [tuple(row) for row in result] if statement.returns else []


def run_alone(connection: AnyConnection, statement: Statement, parameter: str | None) -> Rows:
    """In a transaction of its own. Raises OpenTransaction."""
    own = connection() if callable(connection) else connection  # a scoped session is
    if own.in_transaction():
        raise OpenTransaction
    with own.begin():
        return run(own, statement, parameter)


async def run_async(connection: AnyAsyncConnection, statement: Statement, parameter: str | None) -> Rows:
    """In the caller's transaction. Raises NoTransaction."""
    own = connection() if callable(connection) else connection  # a scoped session is
    return await own.run_sync(run, statement, parameter)


async def read_async(connection: AnyAsyncConnection, statement: Statement, parameter: str | None) -> Rows:
    """In a transaction or not."""
    own = connection() if callable(connection) else connection  # a scoped session is
    return await own.run_sync(read, statement, parameter)


async def run_alone_async(connection: AnyAsyncConnection, statement: Statement, parameter: str | None) -> Rows:
    """In a transaction of its own. Raises OpenTransaction."""
    own = connection() if callable(connection) else connection  # a scoped session is
    return await own.run_sync(run_alone, statement, parameter)


@lru_cache(maxsize=64)
def _clause(statement: Statement) -> TextClause:
    """A colon is SQLAlchemy's mark of a parameter, unless a backslash is before it."""
    parts = [part.replace(":", r"\:") for part in (statement.before, statement.after) if part is not None]
    return text(":rows".join(parts))
