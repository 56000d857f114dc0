"""psycopg 3. Its connections begin a transaction with the first statement, unless they are in autocommit mode."""

from typing import Any

from psycopg import AsyncConnection, AsyncCursor, Connection, Cursor
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from cdc_outbox.transactions import NoTransaction, OpenTransaction, Rows, Statement


def run(connection: Connection[Any], statement: Statement, parameter: str | None) -> Rows:
    """In the caller's transaction. Raises NoTransaction."""
    _refuse_no_transaction(connection)
    return read(connection, statement, parameter)


def read(connection: Connection[Any], statement: Statement, parameter: str | None) -> Rows:
    """In a transaction or not."""
    # not connection.cursor(): the caller's cursor factory may read other placeholders
    with Cursor(connection, row_factory=tuple_row) as cursor:
        cursor.execute(_text(statement), _parameters(parameter))
        return cursor.fetchall() if statement.returns else []


def run_alone(connection: Connection[Any], statement: Statement, parameter: str | None) -> Rows:
    """In a transaction of its own. Raises OpenTransaction."""
    _refuse_open_transaction(connection)
    with connection.transaction():
        return run(connection, statement, parameter)


async def run_async(connection: AsyncConnection[Any], statement: Statement, parameter: str | None) -> Rows:
    """In the caller's transaction. Raises NoTransaction."""
    _refuse_no_transaction(connection)
    return await read_async(connection, statement, parameter)


async def read_async(connection: AsyncConnection[Any], statement: Statement, parameter: str | None) -> Rows:
    """In a transaction or not."""
    async with AsyncCursor(connection, row_factory=tuple_row) as cursor:
        await cursor.execute(_text(statement), _parameters(parameter))
        return await cursor.fetchall() if statement.returns else []


async def run_alone_async(connection: AsyncConnection[Any], statement: Statement, parameter: str | None) -> Rows:
    """In a transaction of its own. Raises OpenTransaction."""
    _refuse_open_transaction(connection)
    async with connection.transaction():
        return await run_async(connection, statement, parameter)


def _text(statement: Statement) -> bytes:
    return statement.text("%s", escape="%").encode()


def _parameters(parameter: str | None) -> list[str] | None:
    return None if parameter is None else [parameter]


def _refuse_no_transaction(connection: Connection[Any] | AsyncConnection[Any]) -> None:
    if connection.autocommit and connection.info.transaction_status == TransactionStatus.IDLE:
        raise NoTransaction("write `with connection.transaction():` around it and the change")


def _refuse_open_transaction(connection: Connection[Any] | AsyncConnection[Any]) -> None:
    if connection.info.transaction_status != TransactionStatus.IDLE:
        raise OpenTransaction
