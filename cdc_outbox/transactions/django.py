"""Django, by the alias of its connection. It commits each statement unless ``transaction.atomic()`` is around it."""

from typing import Any

from django.db import connections, transaction

from cdc_outbox.transactions import READ_COMMITTED, NoTransaction, OpenTransaction, Rows, Statement


def run(using: str, statement: Statement, parameter: str | None) -> Rows:
    """In the caller's transaction. Raises NoTransaction."""
    connection = connections[using]
    if not _is_in_callers_atomic(connection) and (connection.in_atomic_block or connection.get_autocommit()):
        raise NoTransaction(f"write `with transaction.atomic(using={using!r}):` around it and the change")
    return read(using, statement, parameter)


def read(using: str, statement: Statement, parameter: str | None) -> Rows:
    """In a transaction or not."""
    with connections[using].cursor() as cursor:
        cursor.execute(statement.text("%s", escape="%"), None if parameter is None else [parameter])
        return [tuple(row) for row in cursor.fetchall()] if statement.returns else []


def run_alone(using: str, statement: Statement, parameter: str | None) -> Rows:
    """In a transaction of its own. Raises OpenTransaction."""
    connection = connections[using]
    if connection.in_atomic_block or not connection.get_autocommit():
        raise OpenTransaction
    with transaction.atomic(using=using):
        read(using, READ_COMMITTED, None)
        return read(using, statement, parameter)


def _is_in_callers_atomic(connection: Any) -> bool:
    """TestCase's own around each test does not count: it would hide that the code under test has none."""
    return any(not getattr(block, "_from_testcase", False) for block in connection.atomic_blocks)
