"""Any driver of Python's Database API (PEP 249): psycopg2, pg8000 and their like.

Their connections begin a transaction with the first statement, unless they have an ``autocommit`` that is on.
"""

import sys
from contextlib import closing
from functools import cache
from typing import Any, Final, Protocol

from cdc_outbox.transactions import READ_COMMITTED, NoTransaction, OpenTransaction, Rows, Statement

#: By a driver's paramstyle, as PEP 249 names them.
_PLACEHOLDERS: Final = {"format": "%s", "pyformat": "%(rows)s", "qmark": "?", "numeric": ":1", "named": ":rows"}
#: libpq's PQTRANS_IDLE, which psycopg2 hands on.
_IDLE: Final = 0


class Connection(Protocol):
    """A connection of PEP 249; of its cursors drivers publish types that do not fit each other."""

    def cursor(self) -> Any: ...
    def commit(self) -> Any: ...
    def rollback(self) -> Any: ...


def run(connection: Connection, statement: Statement, parameter: str | None) -> Rows:
    """In the caller's transaction. Raises NoTransaction."""
    with closing(connection.cursor()) as cursor:
        # asked now: there are wrappers that connect, and know of autocommit, with the first cursor
        if getattr(connection, "autocommit", False) and _is_idle(connection) is not False:
            cursor.execute("SELECT 1")  # inside of `with connection:` psycopg2 begins with the first statement
            if _is_idle(connection) is not False:
                raise NoTransaction("turn its autocommit off, or begin one")
        return _execute(connection, cursor, statement, parameter)


def read(connection: Connection, statement: Statement, parameter: str | None) -> Rows:
    """In a transaction or not."""
    with closing(connection.cursor()) as cursor:
        return _execute(connection, cursor, statement, parameter)


def run_alone(connection: Connection, statement: Statement, parameter: str | None) -> Rows:
    """In a transaction of its own. Raises OpenTransaction, with a driver that says whether one is open.

    With one that does not, it is the caller's: it is committed with what was done in it.
    """
    if _is_idle(connection) is False:
        raise OpenTransaction
    try:
        run(connection, READ_COMMITTED, None)
        rows = run(connection, statement, parameter)
    except BaseException:
        connection.rollback()
        raise
    connection.commit()
    return rows


def _execute(connection: Connection, cursor: Any, statement: Statement, parameter: str | None) -> Rows:
    style = _paramstyle(type(connection))
    text = statement.text(_PLACEHOLDERS[style], escape="%" if "format" in style else "")
    if parameter is None:
        cursor.execute(text)
    else:
        cursor.execute(text, {"rows": parameter} if style in ("pyformat", "named") else (parameter,))
    if not statement.returns:
        return []
    return [tuple(row.values()) if isinstance(row, dict) else tuple(row) for row in cursor.fetchall()]


def _is_idle(connection: Connection) -> bool | None:
    """None if the driver does not say."""
    if ask := getattr(connection, "get_transaction_status", None):  # psycopg2
        return bool(ask() == _IDLE)
    return None


@cache
def _paramstyle(kind: type) -> str:
    """Of the module that a connection's class is from, or a package around it; an heir's own module has none."""
    for ancestor in kind.__mro__:
        module = ancestor.__module__
        while module:
            style = getattr(sys.modules.get(module), "paramstyle", None)
            if style in _PLACEHOLDERS:
                return str(style)
            module = module.rpartition(".")[0]
    return "format"
