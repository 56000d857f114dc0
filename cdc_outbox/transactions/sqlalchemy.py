"""SQLAlchemy 2, Core and ORM, on any of its PostgreSQL drivers.

Its connections and sessions begin a transaction with the first statement, unless their isolation level is AUTOCOMMIT.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from sqlalchemy import Connection, TextClause, text
from sqlalchemy.orm import Session, scoped_session

from cdc_outbox.transactions import READ_COMMITTED, NoTransaction, OpenTransaction, Rows, Statement

if TYPE_CHECKING:  # importing it asks for greenlet, which who writes no asynchronous code need not have
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session

AnyConnection: TypeAlias = Connection | Session | scoped_session[Any]
AnyAsyncConnection: TypeAlias = "AsyncConnection | AsyncSession | async_scoped_session[Any]"


_SEVERAL: Final = (
    "this session has several databases; give the connection of the change instead:"
    " session.connection(bind_arguments={'mapper': ...})"
)


def run(connection: AnyConnection, statement: Statement, parameter: str | None) -> Rows:
    """In the caller's transaction. Raises NoTransaction; ValueError for a session of several databases."""
    own = _connection_of(connection)
    if getattr(own.connection.dbapi_connection, "autocommit", False):
        raise NoTransaction("give the change a connection whose isolation_level is not AUTOCOMMIT")
    return read(own, statement, parameter)


def read(connection: AnyConnection, statement: Statement, parameter: str | None) -> Rows:
    """In a transaction or not."""
    parameters = None if parameter is None else {"rows": parameter}
    result = _connection_of(connection).execute(_clause(statement), parameters)
    return [tuple(row) for row in result] if statement.returns else []


def run_alone(connection: AnyConnection, statement: Statement, parameter: str | None) -> Rows:
    """In a transaction of its own. Raises OpenTransaction."""
    own = connection() if callable(connection) else connection  # a scoped session is
    if own.in_transaction():
        raise OpenTransaction
    with own.begin():
        run(own, READ_COMMITTED, None)
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


def _connection_of(given: AnyConnection) -> Connection:
    """On which a session has begun. Raises ValueError if its transaction has, or may have, several databases in it."""
    if isinstance(given, Connection):
        return given
    own = given() if callable(given) else given  # a scoped session is
    binds = getattr(own, "binds", None) or getattr(own, "_Session__binds", None) or {}  # of 2.1, of 2.0
    engines = {own.bind, *binds.values()} - {None}
    if len(engines) > 1:
        raise ValueError(_SEVERAL)
    is_bound_by_binds = own.bind is None and len(engines) == 1 and type(own).get_bind is Session.get_bind
    connection = own.connection(bind_arguments={"bind": engines.pop()} if is_bound_by_binds else None)
    # Where get_bind chooses, by the class or at random: what is in the transaction already shows what it has chosen.
    in_use = {used.engine.pool for used, *_ in getattr(own.get_transaction(), "_connections", {}).values()}
    if in_use - {connection.engine.pool}:
        raise ValueError(_SEVERAL)
    return connection


@lru_cache(maxsize=64)
def _clause(statement: Statement) -> TextClause:
    """A colon is SQLAlchemy's mark of a parameter, unless a backslash is before it."""
    parts = [part.replace(":", r"\:") for part in (statement.before, statement.after) if part is not None]
    return text(":rows".join(parts))
