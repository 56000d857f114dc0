"""The inbox with Django: the connection is named by its alias, as everywhere in Django.

As an application of Django's (``"cdc_outbox.inbox.django"`` in INSTALLED_APPS) it brings the migration of the tables.
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta

from cdc_outbox.inbox import (
    IdempotencyKeyReused,
    InProgress,
    Message,
    NoMessageId,
    NotParked,
    NoTransaction,
    OpenTransaction,
)
from cdc_outbox.inbox.any_driver import InboxOf, Request
from cdc_outbox.transactions import Rows, Statement, django

__all__ = [
    "IdempotencyKeyReused",
    "InProgress",
    "Inbox",
    "Message",
    "NoMessageId",
    "NoTransaction",
    "NotParked",
    "OpenTransaction",
    "Request",
]


class _InboxOfAlias(InboxOf[str]):
    def _run(self, connection: str, statement: Statement, parameter: str | None) -> Rows:
        return django.run(connection, statement, parameter)

    def _run_alone(self, connection: str, statement: Statement, parameter: str | None) -> Rows:
        return django.run_alone(connection, statement, parameter)


class Inbox:
    """``any_driver.InboxOf``, whose methods say more, with ``using`` in the place of the connection.

    They work in ``transaction.atomic(using=...)``, and raise NoTransaction outside, but for ``due`` and ``prune``,
    which need a connection without one. Has no connection and no state: make one, keep it. Raises ValueError for a
    consumer without a name, or a table that cannot be one. ``confluent.consume`` takes psycopg's Inbox, and Django's
    connection (README.md).
    """

    def __init__(self, consumer: str, *, table: str = "public.inbox") -> None:
        self._inbox = _InboxOfAlias(consumer, table=table)

    def once(self, message: Message, *, using: str = "default") -> bool:
        """Whether ``message`` is new to this consumer. Then act on it, in this transaction."""
        return self._inbox.once(using, message)

    def once_many(self, messages: Iterable[Message], *, using: str = "default") -> list[Message]:
        """Those of ``messages`` that are new, in their order, with one statement."""
        return self._inbox.once_many(using, messages)

    def newer(self, message: Message, *, version: int | str | None = None, using: str = "default") -> bool:
        """Whether it is of a later version than any of its aggregate before. Then write its state."""
        return self._inbox.newer(using, message, version=version)

    def request(self, key: str, body: bytes, *, using: str = "default") -> Request[str]:
        """The request with this idempotency key: its ``replay``, or, if that is None, carry it out and ``store``."""
        return self._inbox.request(using, key, body)

    def park(self, message: Message, error: object, *, attempts: int = 1, using: str = "default") -> None:
        """Take a message out of the way whose handling failed with ``error``."""
        self._inbox.park(using, message, error, attempts=attempts)

    def park_followers(self, messages: Iterable[Message], *, using: str = "default") -> list[Message]:
        """Park those that follow a parked message of the same topic and key; returns the others, in their order."""
        return self._inbox.park_followers(using, messages)

    def due(self, *, attempts: int = 5, topics: Sequence[str] | None = None, using: str = "default") -> Message | None:
        """The next parked message whose turn it is to be tried again, or None."""
        return self._inbox.due(using, attempts=attempts, topics=topics)

    def retry(self, message: Message, *, using: str = "default") -> bool:
        """Whether a message from ``due`` is still to be handled. Then act on it, in this transaction."""
        return self._inbox.retry(using, message)

    def unpark(self, message_id: str, *, source: str = "", using: str = "default") -> None:
        """Have a parked message tried again, and after it what waits behind it, in order. Raises NotParked."""
        self._inbox.unpark(using, message_id, source=source)

    def discard(self, message_id: str, *, source: str = "", using: str = "default") -> None:
        """Give a parked message up, and let what waits behind it go on. Raises NotParked."""
        self._inbox.discard(using, message_id, source=source)

    def prune(self, older_than: timedelta, *, using: str = "default") -> int:
        """Forget what this consumer handled longer than ``older_than`` ago; returns how many rows were deleted."""
        return self._inbox.prune(using, older_than)
