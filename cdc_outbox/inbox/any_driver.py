"""The inbox for connections of any kind: a driver's module says of which, and how a statement is run on one."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Final, Generic, TypeVar

from cdc_outbox.inbox.message import Message
from cdc_outbox.inbox.requests import LOCK_NOT_AVAILABLE, InProgress, Kept, replay_of
from cdc_outbox.inbox.table import InboxTable
from cdc_outbox.transactions import Rows, Statement, Steps, run_each, run_each_async, sqlstate

C = TypeVar("C")
R = TypeVar("R")

_NOTHING: Final = Statement("SELECT 1", returns=True)


class InboxOf(InboxTable, Generic[C]):
    """Tells which messages are new, in the caller's transaction. Has no connection and no state: make one, keep it.

    What a method is given as ``connection`` has the caller's transaction, unless it says that it needs one of its own.
    All raise NoTransaction, and what the driver raises.
    """

    def once(self, connection: C, message: Message) -> bool:
        """Whether ``message`` is new to this consumer. Then act on it, in this transaction.

        If another session has it right now, this waits for that one's end (READ COMMITTED), or ends with the driver's
        serialization error (REPEATABLE READ, SERIALIZABLE): roll back and try again. If you catch an error of the
        handling and commit anyway, the message is lost.
        """
        return bool(self.once_many(connection, [message]))

    def once_many(self, connection: C, messages: Iterable[Message]) -> list[Message]:
        """Those of ``messages`` that are new, in their order, with one statement. Else as ``once``."""
        return self._each(connection, self._fresh(messages))

    def newer(self, connection: C, message: Message, *, version: int | str | None = None) -> bool:
        """Whether it is of a later version than any of its aggregate before. Then write its state, in this transaction.

        An aggregate is a topic and a key. ``version`` is the application's own, a whole number or a text that is
        ordered byte by byte; without one the relay's, from the header ``sequence``. Writers must lock the aggregate's
        row, so that versions rise as their transactions commit. Needs no ``once`` beside it: a copy is not newer.
        Raises ValueError without a key, or without any version.
        """
        return self._each(connection, self._versions.newer(message, version))

    def request(self, connection: C, key: str, body: bytes) -> "Request[C]":
        """The request with this idempotency key: its ``replay``, or, if that is None, carry it out and ``store``.

        If another session has the key right now, this waits for its end, at most ``lock_timeout``. Raises
        IdempotencyKeyReused (HTTP 422) if the key came with another body, InProgress (409) after ``lock_timeout``,
        ValueError if it is no key. If the transaction rolls back, the key is as if it had never come.
        """
        with _lock_timeout_is_in_progress(key):
            kept = self._each(connection, self._requests.begin(key, body))
        return Request(self, connection, key, kept)

    def park(self, connection: C, message: Message, error: object, *, attempts: int = 1) -> None:
        """Take a message out of the way whose handling failed with ``error``, so that its offset can be committed.

        After the failed transaction was rolled back, in a new one. It is tried again, by ``due``, until it has failed
        ``attempts`` times; then it waits for ``unpark``. Nothing is done if it was handled meanwhile. Raises TypeError
        for a value that is no bytes, text or JSON.
        """
        self._each(connection, self._park(message, error, attempts))

    def park_followers(self, connection: C, messages: Iterable[Message]) -> list[Message]:
        """Park those that follow a parked message of the same topic and key; returns the others, in their order.

        To be asked in the transaction of ``once``, after it, about messages that are new.
        """
        return self._each(connection, self._parked.park_followers(list(messages)))

    def due(self, connection: C, *, attempts: int = 5, topics: Sequence[str] | None = None) -> Message | None:
        """The next parked message, of ``topics`` if they are given, whose turn it is to be tried again, or None.

        Needs no transaction: the attempt is counted in one of its own, before it is made, so that a handler which ends
        the process is found too, after ``attempts``. For ten seconds nobody else gets it. Raises OpenTransaction.
        """
        return run_each(self._parked.due(attempts, topics), partial(self._run_alone, connection))

    def retry(self, connection: C, message: Message) -> bool:
        """Whether a message from ``due`` is still to be handled. Then act on it here, as after ``once``.

        If that fails: roll back, and ``park`` it, with the same ``attempts`` as ``due``.
        """
        return self._each(connection, self._parked.retry(message))

    def unpark(self, connection: C, message_id: str, *, source: str = "") -> None:
        """Have a parked message tried again, and after it what waits behind it, in order. Raises NotParked."""
        self._each(connection, self._parked.decide(message_id, source, "retry"))

    def discard(self, connection: C, message_id: str, *, source: str = "") -> None:
        """Give a parked message up: it is never handled, and what waits behind it goes on. Raises NotParked."""
        self._each(connection, self._parked.decide(message_id, source, "discarded"))

    def count_attempt(self, connection: C, message: Message) -> int:
        """Write down, in a transaction of its own, that it is about to be handled; how often that was begun by now.

        What is higher than one tells of a process that ended meanwhile. Raises OpenTransaction.
        """
        return run_each(self._attempts.count(message), partial(self._run_alone, connection))

    def uncount_attempts(self, connection: C, messages: Iterable[Message]) -> None:
        """Take back one ``count_attempt`` of each: the process ends, but not because of them."""
        self._each(connection, self._attempts.uncount(messages))

    def forget_attempts(self, connection: C, messages: Iterable[Message]) -> None:
        """In the transaction that handled them: what ``count_attempt`` wrote."""
        self._each(connection, self._attempts.forget(messages))

    def check(self, connection: C) -> None:
        """Raises what the driver raises if this transaction has failed: to commit it would be to roll it back."""
        self._run(connection, _NOTHING, None)

    def prune(self, connection: C, older_than: timedelta) -> int:
        """Forget what this consumer handled longer than ``older_than`` ago; returns how many rows were deleted.

        Messages, parked ones that are past, and requests with their responses; not what is parked, not versions. Works
        in many short transactions of its own; a consumer waits for it a tenth of a second at most. A message that
        comes again afterwards is new: keep ids for longer than anybody may replay or redrive. Partitions that hold
        nothing else are dropped, and not counted; that needs their ownership. Raises OpenTransaction; NoTransaction for
        a connection of SQLAlchemy or a DB-API driver in autocommit mode; and what the driver raises.
        """
        return run_each(self._pruning(older_than), partial(self._run_alone, connection))

    def _each(self, connection: C, steps: Steps[R]) -> R:
        return run_each(steps, partial(self._run, connection))

    def _run(self, connection: C, statement: Statement, parameter: str | None) -> Rows:
        raise NotImplementedError

    def _run_alone(self, connection: C, statement: Statement, parameter: str | None) -> Rows:
        raise NotImplementedError


class AsyncInboxOf(InboxTable, Generic[C]):
    """``InboxOf`` for asynchronous connections, but for what only ``confluent.consume`` needs.

    Each method says and raises what its twin there does.

    Do not forget ``await``: a coroutine is true. mypy finds that with ``enable_error_code = ["truthy-bool"]``.
    """

    async def once(self, connection: C, message: Message) -> bool:
        """Whether ``message`` is new to this consumer; see ``InboxOf.once``."""
        return bool(await self.once_many(connection, [message]))

    async def once_many(self, connection: C, messages: Iterable[Message]) -> list[Message]:
        """Those of ``messages`` that are new, in their order, with one statement. Else as ``once``."""
        return await self._each(connection, self._fresh(messages))

    async def newer(self, connection: C, message: Message, *, version: int | str | None = None) -> bool:
        """Whether it is of a later version than any of its aggregate before; see ``InboxOf.newer``."""
        return await self._each(connection, self._versions.newer(message, version))

    async def request(self, connection: C, key: str, body: bytes) -> "AsyncRequest[C]":
        """The request with this idempotency key; see ``InboxOf.request``."""
        with _lock_timeout_is_in_progress(key):
            kept = await self._each(connection, self._requests.begin(key, body))
        return AsyncRequest(self, connection, key, kept)

    async def park(self, connection: C, message: Message, error: object, *, attempts: int = 1) -> None:
        """Take a message out of the way whose handling failed with ``error``; see ``InboxOf.park``."""
        await self._each(connection, self._park(message, error, attempts))

    async def park_followers(self, connection: C, messages: Iterable[Message]) -> list[Message]:
        """Park those that follow a parked message; returns the others; see ``InboxOf.park_followers``."""
        return await self._each(connection, self._parked.park_followers(list(messages)))

    async def due(self, connection: C, *, attempts: int = 5, topics: Sequence[str] | None = None) -> Message | None:
        """The next parked message whose turn it is to be tried again, or None; see ``InboxOf.due``."""
        return await run_each_async(self._parked.due(attempts, topics), partial(self._run_alone, connection))

    async def retry(self, connection: C, message: Message) -> bool:
        """Whether a message from ``due`` is still to be handled; see ``InboxOf.retry``."""
        return await self._each(connection, self._parked.retry(message))

    async def unpark(self, connection: C, message_id: str, *, source: str = "") -> None:
        """Have a parked message tried again, and what waits behind it after it. Raises NotParked."""
        await self._each(connection, self._parked.decide(message_id, source, "retry"))

    async def discard(self, connection: C, message_id: str, *, source: str = "") -> None:
        """Give a parked message up: it is never handled, and what waits behind it goes on. Raises NotParked."""
        await self._each(connection, self._parked.decide(message_id, source, "discarded"))

    async def prune(self, connection: C, older_than: timedelta) -> int:
        """Forget what this consumer handled longer than ``older_than`` ago; see ``InboxOf.prune``."""
        return await run_each_async(self._pruning(older_than), partial(self._run_alone, connection))

    async def _each(self, connection: C, steps: Steps[R]) -> R:
        return await run_each_async(steps, partial(self._run, connection))

    async def _run(self, connection: C, statement: Statement, parameter: str | None) -> Rows:
        raise NotImplementedError

    async def _run_alone(self, connection: C, statement: Statement, parameter: str | None) -> Rows:
        raise NotImplementedError


class Request(Generic[C]):
    """A request with an idempotency key. ``replay`` is the response it had, or None if it is to be carried out now."""

    def __init__(self, inbox: InboxOf[C], connection: C, key: str, kept: Kept) -> None:
        self._inbox = inbox
        self._connection = connection
        self._key = key
        self.replay: Any = replay_of(kept)

    def store(self, response: Any) -> Any:
        """Keep the response, bytes, text or JSON, in the transaction that carried it out; returns it."""
        self._inbox._each(self._connection, self._inbox._requests.store(self._key, response))  # noqa: SLF001
        return response


class AsyncRequest(Generic[C]):
    """``Request`` on an asynchronous connection."""

    def __init__(self, inbox: AsyncInboxOf[C], connection: C, key: str, kept: Kept) -> None:
        self._inbox = inbox
        self._connection = connection
        self._key = key
        self.replay: Any = replay_of(kept)

    async def store(self, response: Any) -> Any:
        """Keep the response, bytes, text or JSON, in the transaction that carried it out; returns it."""
        await self._inbox._each(self._connection, self._inbox._requests.store(self._key, response))  # noqa: SLF001
        return response


@contextmanager
def _lock_timeout_is_in_progress(key: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if sqlstate(error) != LOCK_NOT_AVAILABLE:
            raise
        raise InProgress(f"another request with idempotency key {key!r} is being carried out") from error
