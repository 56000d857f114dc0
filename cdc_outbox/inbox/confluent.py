"""A loop for confluent-kafka around the inbox: each message once, a batch a transaction, and what goes wrong survived.

The walk of a batch: it is fetched (``partitions``), handled in one transaction, and only then its offsets are
committed. If that fails its messages are handled one by one. What a handler cannot take is tried again, and then stops
the loop or is parked. If it is the database that fails, nothing is kept here: the consumer goes back to where it was,
and waits.
"""

import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

from confluent_kafka import Consumer
from confluent_kafka import Message as Record

from cdc_outbox.inbox.any_driver import InboxOf
from cdc_outbox.inbox.librdkafka import setting
from cdc_outbox.inbox.message import Message, name_of
from cdc_outbox.inbox.partitions import Partitions
from cdc_outbox.transactions import NoTransaction, sqlstate

__all__ = ["Message", "PoisonMessage", "consume"]


class Connection(Protocol):
    """Of psycopg, SQLAlchemy (a Session, too), psycopg2 and their like; not in autocommit mode."""

    def commit(self) -> Any: ...
    def rollback(self) -> Any: ...
    def close(self) -> Any: ...


C = TypeVar("C", bound=Connection)

_log: Final = logging.getLogger(__name__)
#: How often somebody looks for parked messages whose turn has come.
_LOOK_SECONDS: Final = 1.0
#: Of that time spent on looking, where very many are parked.
_LOOK_SHARE: Final = 0.05
_SHORTEST_WAIT_SECONDS: Final = 0.1
_LONGEST_WAIT_SECONDS: Final = 10.0
#: So many different messages in a row that fail: it is not they.
_SUSPICIOUS: Final = 5
#: SQLSTATE classes that waiting does not mend: the inbox is not there, is another one, or may not be used.
_OF_THE_CALLER: Final = ("0A", "22", "23", "42")
#: What a transaction tells of the handler at its end: a deferred constraint, and an error that the handler has caught.
_OF_THE_HANDLER: Final = ("23", "25P02")
_UNDEFINED_TABLE: Final = "42P01"
_DIED: Final = "the process ended while it was handling this, each time"


class PoisonMessage(RuntimeError):
    """A message that the handler cannot take. Its offset is not committed: it comes again."""

    def __init__(self, message: Message, why: object) -> None:
        super().__init__(f"message {message.id!r} at {message.place}: {why}")
        self.message = message


class _HandlerFailed(Exception):
    """The transaction was rolled back. ``__cause__`` says why."""


class _TryLater(Exception):
    """The database is away, or a message is to be tried again; the transaction was rolled back."""


def consume(  # noqa: PLR0913 - each is a decision of the caller's
    consumer: Consumer,
    connect: Callable[[], C],
    handler: Callable[[C, Message], object],
    *,
    inbox: InboxOf[C],
    topics: Sequence[str] | None = None,
    batch: int = 100,
    attempts: int = 5,
    on_poison: Literal["stop", "park"] = "stop",
    source: str = "",
    stop: threading.Event | None = None,
) -> None:
    """Call ``handler(connection, message)`` once for each message of ``topics``, until ``stop`` is set.

    ``connect`` makes a connection that is not in autocommit mode; the loop commits, rolls back and closes it, the
    handler must not. ``topics`` are subscribed to; leave them out for a consumer that is subscribed, or assigned,
    already. Without ``stop`` SIGTERM and SIGINT stop it, in the main thread: the batch at hand is finished, its offsets
    are committed. The consumer is left open.

    A message that fails is tried ``attempts`` times by itself. Then, ``on_poison``: *stop* raises PoisonMessage; *park*
    keeps it in the inbox's database, and behind it what follows of its key. With *stop* all wait meanwhile, with *park*
    nobody does. A message without an id is poison at once. ``source``: as in ``Message.from_confluent``.

    Raises ValueError where ``enable.auto.commit`` is on; NoTransaction; KafkaException and the driver's errors where
    waiting does not help: no right to read the topic, no inbox in the database. Brokers and databases that are away are
    waited for.
    """
    if isinstance(consumer, Consumer) and setting(consumer, "enable.auto.commit") == "true":
        raise ValueError(
            "enable.auto.commit is true: offsets would be committed before messages are handled; turn it off"
        )
    if on_poison not in ("stop", "park") or attempts < 1 or batch < 1:
        raise ValueError(f"on_poison is {on_poison!r} ('stop', 'park'), attempts {attempts}, batch {batch} (1 or more)")
    with _stopped_by_signals(stop) as stopping:
        partitions = Partitions(consumer, stopping)
        if topics:
            partitions.subscribe(topics)
        _Loop(partitions, connect, handler, inbox, batch, attempts, source, stopping, parks=on_poison == "park").run()


@dataclass
class _Loop(Generic[C]):
    partitions: Partitions
    connect: Callable[[], C]
    handler: Callable[[C, Message], object]
    inbox: InboxOf[C]
    batch: int
    attempts: int
    source: str
    stopping: threading.Event
    parks: bool
    connection: C | None = None
    #: of messages that have failed, by place; only where the loop stops at last
    failures: Counter[str] = field(default_factory=Counter)
    failed_in_a_row: int = 0
    waits_in_a_row: int = 0
    looks_at: float = 0.0

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                self._step()
        finally:
            self.partitions.close()
            self._disconnect()

    def _step(self) -> None:
        left = self.partitions.fetch(self.batch)
        try:
            if left and not self._handle_together(left):
                self._handle_each(left)
            self._retry_parked()
            self.waits_in_a_row = 0
        except _TryLater as error:
            _log.warning("waiting: %r", error.__cause__)
            self.partitions.go_back(left)
            seconds = min(_SHORTEST_WAIT_SECONDS * 2**self.waits_in_a_row, _LONGEST_WAIT_SECONDS)
            self.waits_in_a_row = min(self.waits_in_a_row + 1, 10)
            self.partitions.wait(seconds)

    def _handle_together(self, records: list[Record]) -> bool:
        """Whether they could be, in one transaction. Not the first of a partition: they may have ended a process."""
        has_failed = self.failures and any(_place(record) in self.failures for record in records)
        if has_failed or self.partitions.are_new(records):
            return False
        try:
            messages = [Message.from_confluent(record, source=self.source) for record in records]
            with self._transaction() as connection:
                fresh = self.inbox.once_many(connection, messages)
                for message in self.inbox.park_followers(connection, fresh):
                    self._call(connection, message)
        except (_HandlerFailed, ValueError) as error:
            _log.info("a batch of %s failed, they are handled one by one: %r", len(records), error.__cause__ or error)
            return False
        self.partitions.done(records, at_once=False)
        return True

    def _handle_each(self, left: list[Record]) -> None:
        """One by one; what is handled is taken from the list."""
        are_new, handled = self.partitions.are_new(left), 0
        try:
            for record in left:
                if self.stopping.is_set():
                    break
                self._handle_alone(record, is_suspect=are_new)
                handled += 1
        finally:
            # at once, so that a handler which ends the process in the next batch is among the first the next time
            self.partitions.done(left[:handled], at_once=are_new)
            del left[:handled]

    def _handle_alone(self, record: Record, *, is_suspect: bool) -> None:
        """Returns when it is handled or parked. Raises _TryLater, PoisonMessage."""
        try:
            message = Message.from_confluent(record, source=self.source)
        except ValueError as error:  # no id, or no time
            self._give_up(Message.nameless(record, source=self.source), error)
            return
        if is_suspect:
            with self._own_statements():
                tried = self.inbox.count_attempt(self._connected(), message)
            if tried > self.attempts:
                self._give_up(message, _DIED)
                return
        try:
            with self._transaction() as connection:
                if self.inbox.once(connection, message) and self.inbox.park_followers(connection, [message]):
                    self._call(connection, message)
                if is_suspect:
                    self.inbox.forget_attempts(connection, [message])
            self.failures.pop(message.place, None)
        except _HandlerFailed as failure:
            self._failed(message, failure)

    def _failed(self, message: Message, failure: _HandlerFailed) -> None:
        _log.warning("message %r at %s failed: %r", message.id, message.place, failure.__cause__)
        if not self.parks:
            self.failures[message.place] += 1
            if self.failures[message.place] >= self.attempts:
                raise PoisonMessage(message, repr(failure.__cause__)) from failure.__cause__
            raise _TryLater from failure.__cause__
        self._park(message, failure.__cause__, self.attempts)
        self.failed_in_a_row += 1
        if self.failed_in_a_row >= _SUSPICIOUS:  # not they, but something that all need: do not park the whole topic
            self.partitions.wait(min(_SHORTEST_WAIT_SECONDS * self.failed_in_a_row, _LONGEST_WAIT_SECONDS))

    def _give_up(self, message: Message, why: object) -> None:
        """What cannot be handled, however often it is tried."""
        if self.parks:
            self._park(message, why, 1)
            return
        with self._transaction() as connection:  # who starts again, with another handler, begins again to count
            self.inbox.forget_attempts(connection, [message])
        raise PoisonMessage(message, why)

    def _park(self, message: Message, why: object, attempts: int) -> None:
        with self._transaction() as connection:
            self.inbox.park(connection, message, why, attempts=attempts)
            self.inbox.forget_attempts(connection, [message])
        self.looks_at = time.monotonic() + _SHORTEST_WAIT_SECONDS

    def _retry_parked(self) -> None:
        """Those whose turn has come, each in a transaction of its own."""
        began = time.monotonic()
        if began < self.looks_at:
            return
        for _ in range(self.batch):
            with self._own_statements():
                message = self.inbox.due(self._connected(), attempts=self.attempts)
            if message is None or self.stopping.is_set():
                break
            try:
                with self._transaction() as connection:
                    if self.inbox.retry(connection, message):
                        self._call(connection, message)
            except _HandlerFailed as failure:
                _log.warning("parked message %r failed: %r", message.id, failure.__cause__)
                self._park(message, failure.__cause__, self.attempts)
        else:
            return  # there may be more: looked for again after the next batch
        self.looks_at = max(self.looks_at, began) + max(_LOOK_SECONDS, (time.monotonic() - began) / _LOOK_SHARE)

    def _call(self, connection: C, message: Message) -> None:
        try:
            self.handler(connection, message)
        except Exception as error:
            raise _HandlerFailed from error
        self.failed_in_a_row = 0

    @contextmanager
    def _transaction(self) -> Iterator[C]:
        """Committed at its end, or rolled back. Raises as ``_own_statements``."""
        with self._own_statements():
            connection = self._connected()
            yield connection
            try:
                self.inbox.check(
                    connection
                )  # a handler may have caught an error: COMMIT would roll back, and not say so
                connection.commit()
            except Exception as error:  # a deferred constraint, for instance
                raise _HandlerFailed from error

    @contextmanager
    def _own_statements(self) -> Iterator[None]:
        """Raises _HandlerFailed if the connection is well, _TryLater if it is not, and what waiting does not mend."""
        try:
            yield
        except _HandlerFailed as failure:
            if not self._roll_back():
                raise _TryLater from failure.__cause__
            raise
        except Exception as error:
            self._roll_back()
            is_bug = type(error).__module__ == "builtins" and not isinstance(error, OSError)
            if is_bug or isinstance(error, NoTransaction) or sqlstate(error).startswith(_OF_THE_CALLER):
                if sqlstate(error) == _UNDEFINED_TABLE:
                    error.add_note("cdc-outbox migrate inbox up makes the inbox's tables")
                raise
            self._disconnect()
            raise _TryLater from error
        except BaseException:
            self._roll_back()
            raise

    def _connected(self) -> C:
        if self.connection is None:
            self.connection = self.connect()
        return self.connection

    def _roll_back(self) -> bool:
        """Whether the connection is well after it; if not it is closed."""
        try:
            connection = self._connected()
            connection.rollback()
            self.inbox.check(connection)
            connection.rollback()
        except Exception as error:  # noqa: BLE001 - whatever a driver raises
            _log.info("the connection is lost: %r", error)
            self._disconnect()
            return False
        return True

    def _disconnect(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            with suppress(Exception):
                connection.close()


def _place(record: Record) -> str:
    return name_of(record.topic() or "", record.partition(), record.offset())


@contextmanager
def _stopped_by_signals(stop: threading.Event | None) -> Iterator[threading.Event]:
    """The caller's event; or one that SIGTERM and SIGINT set, where they can be handled. A second one is not held."""
    stopping = stop or threading.Event()
    if stop is not None or threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        stopping.set()
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        restore()
