"""psycopg 3. Its connections begin a transaction with the first statement, unless they are in autocommit mode."""

from typing import Any

from psycopg import AsyncConnection, AsyncCursor, Connection, Cursor
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from cdc_outbox.transactions import READ_COMMITTED, NoTransaction, OpenTransaction, Rows, Statement


def run(connection: Connection[Any], statement: Statement, parameter: str | None) -> Rows:
    """In the caller's transaction. Raises NoTransaction."""
    if connection.autocommit:
        if connection.info.transaction_status == TransactionStatus.ACTIVE:  # in a pipeline: it tells after a sync
            with connection.pipeline():
                pass
        if connection.info.transaction_status == TransactionStatus.IDLE:
            raise NoTransaction("write `with connection.transaction():` around it and the change")
    return read(connection, statement, parameter)


def read(connection: Connection[Any], statement: Statement, parameter: str | None) -> Rows:
    """In a transaction or not."""
    # not connection.cursor(): the caller's cursor factory may read other placeholders
    with Cursor(connection, row_factory=tuple_row) as cursor:
        cursor.execute(_text(connection, statement), _parameters(parameter))
        return _decoded(cursor.fetchall()) if statement.returns else []


def run_alone(connection: Connection[Any], statement: Statement, parameter: str | None) -> Rows:
    """In a transaction of its own. Raises OpenTransaction."""
    _refuse_open_transaction(connection)
    with connection.transaction():
        read(connection, READ_COMMITTED, None)
        return read(connection, statement, parameter)


async def run_async(connection: AsyncConnection[Any], statement: Statement, parameter: str | None) -> Rows:
    """In the caller's transaction. Raises NoTransaction."""
    if connection.autocommit:
        if connection.info.transaction_status == TransactionStatus.ACTIVE:
            async with connection.pipeline():
                pass
        if connection.info.transaction_status == TransactionStatus.IDLE:
            raise NoTransaction("write `async with connection.transaction():` around it and the change")
    return await read_async(connection, statement, parameter)


async def read_async(connection: AsyncConnection[Any], statement: Statement, parameter: str | None) -> Rows:
    """In a transaction or not."""
    async with AsyncCursor(connection, row_factory=tuple_row) as cursor:
        await cursor.execute(_text(connection, statement), _parameters(parameter))
        return _decoded(await cursor.fetchall()) if statement.returns else []


async def run_alone_async(connection: AsyncConnection[Any], statement: Statement, parameter: str | None) -> Rows:
    """In a transaction of its own. Raises OpenTransaction."""
    _refuse_open_transaction(connection)
    async with connection.transaction():
        await read_async(connection, READ_COMMITTED, None)
        return await read_async(connection, statement, parameter)


def _text(connection: Connection[Any] | AsyncConnection[Any], statement: Statement) -> bytes:
    """As the connection has it; in a database in SQL_ASCII bytes are what one takes them for."""
    encoding = connection.info.encoding
    return statement.text("%s", escape="%").encode("utf-8" if encoding == "ascii" else encoding)


def _parameters(parameter: str | None) -> list[str] | None:
    return None if parameter is None else [parameter]


def _decoded(rows: Rows) -> Rows:
    """Of a database in SQL_ASCII text comes as bytes."""
    return [tuple(value.decode() if isinstance(value, bytes) else value for value in row) for row in rows]


def _refuse_open_transaction(connection: Connection[Any] | AsyncConnection[Any]) -> None:
    if connection.info.transaction_status != TransactionStatus.IDLE:
        raise OpenTransaction
