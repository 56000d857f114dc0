"""A consumer's side of its database: transactions on a connection that is created again; and whose fault a failure is.

A handler's error is the message's (HandlerFailed), a deadlock in it too; one of the database is nobody's and passes
(TryLater); and what waiting does not help is the caller's: it is raised as it is.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Generic, Protocol, TypeVar

from cdc_outbox.inbox.any_driver import InboxOf
from cdc_outbox.inbox.message import Message
from cdc_outbox.transactions import NoTransaction, sqlstate

_log: Final = logging.getLogger(__name__)
#: SQLSTATE classes that waiting does not help: the inbox is not there, is another one, or may not be used.
_OF_THE_CALLER: Final = ("0A", "23", "42")
_OF_THE_DATA: Final = "22"
_UNDEFINED_TABLE: Final = "42P01"


class Connection(Protocol):
    """Of psycopg, SQLAlchemy (a Session, too), psycopg2 and their like; not in autocommit mode."""

    def commit(self) -> Any: ...
    def rollback(self) -> Any: ...
    def close(self) -> Any: ...


C = TypeVar("C", bound=Connection)


class HandlerFailed(Exception):
    """The transaction was rolled back, the connection is well. ``__cause__`` says why."""


class TryLater(Exception):
    """The database is away, or busy; or a message is to be tried again. The transaction was rolled back."""


class LostInHandler(TryLater):
    """The connection was lost while a handler had it: who knows whose fault that is."""


class Unstorable(Exception):
    """The database cannot hold what was to be written: a letter, for instance, that its encoding does not have."""


class Database(Generic[C]):
    def __init__(self, connect: Callable[[], C], inbox: InboxOf[C]) -> None:
        self._connect = connect
        self._inbox = inbox
        self._connection: C | None = None
        self._was_called = False

    @contextmanager
    def transaction(self) -> Iterator[C]:
        """Committed at its end, or rolled back. Raises as ``statements``."""
        self._was_called = False
        with self.statements() as connection:
            yield connection
            try:
                self._inbox.check(connection)  # has the handler caught an error? COMMIT would roll back and not say so
                connection.commit()
            except Exception as error:  # a deferred constraint, for instance
                if self._was_called:
                    raise HandlerFailed from error
                raise

    def call(self, handler: Callable[[C, Message], object], connection: C, message: Message) -> None:
        """In a transaction. Raises HandlerFailed."""
        self._was_called = True
        try:
            handler(connection, message)
        except Exception as error:
            raise HandlerFailed from error

    @contextmanager
    def statements(self) -> Iterator[C]:
        """Of the inbox, which see to their transactions themselves. Raises HandlerFailed, TryLater, Unstorable."""
        try:
            yield self._connected()
        except HandlerFailed as failure:
            # SQLAlchemy's connections connect again by themselves; its errors tell
            was_lost = getattr(failure.__cause__, "connection_invalidated", False)
            if not self._roll_back() or was_lost:
                raise LostInHandler from failure.__cause__
            raise
        except Exception as error:
            self._roll_back()
            state = sqlstate(error)
            if isinstance(error, UnicodeError) or state.startswith(_OF_THE_DATA):
                raise Unstorable from error
            is_bug = type(error).__module__ == "builtins" and not isinstance(error, OSError)
            if is_bug or isinstance(error, NoTransaction) or state.startswith(_OF_THE_CALLER):
                if state == _UNDEFINED_TABLE:
                    error.add_note("cdc-outbox migrate inbox up makes the inbox's tables")
                raise
            self.close()
            raise TryLater from error
        except BaseException:
            self._roll_back()
            raise

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                connection.close()

    def _connected(self) -> C:
        if self._connection is None:
            self._connection = self._connect()
            self._connection.commit()  # what it was set to
        return self._connection

    def _roll_back(self) -> bool:
        """Whether the connection is well after it; if not it is closed."""
        if self._connection is None:
            return False
        try:
            self._connection.rollback()
            self._inbox.check(self._connection)
            self._connection.rollback()
        except Exception as error:  # noqa: BLE001 - whatever a driver raises
            _log.info("the connection is lost: %r", error)
            self.close()
            return False
        return True
