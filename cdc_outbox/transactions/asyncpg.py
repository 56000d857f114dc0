"""asyncpg. Its connections commit each statement, unless ``async with connection.transaction()`` is around it."""

from typing import Any, TypeAlias

import asyncpg  # noqa: TC002 - this module has no other reason to be
from asyncpg.pool import PoolConnectionProxy  # noqa: TC002

from cdc_outbox.transactions import NoTransaction, OpenTransaction, Rows, Statement

#: Its classes take type arguments in its stubs only, so this is read by type checkers.
Connection: TypeAlias = "asyncpg.Connection[Any] | PoolConnectionProxy[Any]"


async def run_async(connection: Connection, statement: Statement, parameter: str | None) -> Rows:
    """In the caller's transaction. Raises NoTransaction."""
    if not connection.is_in_transaction():
        raise NoTransaction("write `async with connection.transaction():` around it and the change")
    return await read_async(connection, statement, parameter)


async def read_async(connection: Connection, statement: Statement, parameter: str | None) -> Rows:
    """In a transaction or not."""
    parameters = [] if parameter is None else [parameter]
    return [tuple(row) for row in await connection.fetch(statement.text("$1"), *parameters)]


async def run_alone_async(connection: Connection, statement: Statement, parameter: str | None) -> Rows:
    """In a transaction of its own. Raises OpenTransaction."""
    if connection.is_in_transaction():
        raise OpenTransaction
    async with connection.transaction(isolation="read_committed"):
        return await read_async(connection, statement, parameter)
