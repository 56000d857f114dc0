"""Django, by the alias of its connection. It commits each statement unless ``transaction.atomic()`` is around it."""

from django.db import connections, transaction

from cdc_outbox.transactions import NoTransaction, OpenTransaction, Rows, Statement


def run(using: str, statement: Statement, parameter: str | None) -> Rows:
    """In the caller's transaction. Raises NoTransaction."""
    connection = connections[using]
    if not connection.in_atomic_block and connection.get_autocommit():
        raise NoTransaction(f"write `with transaction.atomic(using={using!r}):` around it and the change")
    return read(using, statement, parameter)


def read(using: str, statement: Statement, parameter: str | None) -> Rows:
    """In a transaction or not."""
    with connections[using].cursor() as cursor:
        cursor.execute(statement.text("%s", escape="%"), None if parameter is None else [parameter])
        return [tuple(row) for row in cursor.fetchall()] if statement.returns else []


def run_alone(using: str, statement: Statement, parameter: str | None) -> Rows:
    """In a transaction of its own. Raises OpenTransaction."""
    if connections[using].in_atomic_block:
        raise OpenTransaction
    with transaction.atomic(using=using):
        return run(using, statement, parameter)
