"""A loop for confluent-kafka around the inbox: each message once, a batch a transaction, and what goes wrong survived.

The walk of a batch: it is fetched (``partitions``), handled in one transaction (``database``), and only then its
offsets are committed. If that fails its messages are handled one by one. What a handler cannot take is tried again, and
then stops the loop or is parked. If the database fails, nothing is kept here: the consumer goes back, and waits.
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
from typing import Final, Generic, Literal

from confluent_kafka import Consumer, DeserializingConsumer
from confluent_kafka import Message as Record

from cdc_outbox.inbox.any_driver import InboxOf
from cdc_outbox.inbox.attempts import DIED
from cdc_outbox.inbox.database import C, Database, HandlerFailed, LostInHandler, TryLater, Unstorable
from cdc_outbox.inbox.librdkafka import setting
from cdc_outbox.inbox.message import Message
from cdc_outbox.inbox.partitions import Partitions

__all__ = ["Message", "PoisonMessage", "consume"]

_log: Final = logging.getLogger(__name__)
#: How often parked messages are looked for whose turn has come; and the share of the time that may go into it.
_LOOK_SECONDS: Final = 1.0
_LOOK_SHARE: Final = 0.05
#: For how long parked messages are handled before new ones are fetched again.
_RETRY_SECONDS: Final = 1.0
_SHORTEST_WAIT_SECONDS: Final = 0.1
_LONGEST_WAIT_SECONDS: Final = 10.0


class PoisonMessage(RuntimeError):
    """A message that the handler cannot take. Its offset is not committed: it comes again."""

    def __init__(self, message: Message, why: object) -> None:
        super().__init__(f"message {message.id!r} at {message.place}: {why}")
        self.message = message


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

    A message that fails in a batch is tried ``attempts`` times by itself. Then, ``on_poison``: *stop* raises
    PoisonMessage; *park* keeps it in the inbox's database, and behind it what follows of its key. With *stop* all wait
    meanwhile, with *park* nobody does. A message without an id is poison at once, and so is one during which the
    process ended, or the connection was lost, ``attempts`` times. ``source``: as in ``Message.from_confluent``.

    Raises ValueError where ``enable.auto.commit`` is on; NoTransaction; KafkaException and the driver's errors where
    waiting does not help: no right to read the topic, no inbox in the database. Brokers and databases that are away are
    waited for, with a warning in the log (``logging``, cdc_outbox.inbox).
    """
    _check(consumer, inbox)
    if on_poison not in ("stop", "park") or attempts < 1 or batch < 1:
        raise ValueError(f"on_poison is {on_poison!r} ('stop', 'park'), attempts {attempts}, batch {batch} (1 or more)")
    with _stopped_by_signals(stop) as stopping:
        partitions = Partitions(consumer, stopping)
        if topics:
            partitions.subscribe(topics)
        parks = on_poison == "park"
        _Loop(
            partitions, Database(connect, inbox), handler, inbox, batch, attempts, source, stopping, parks=parks
        ).run()


@dataclass
class _Loop(Generic[C]):
    partitions: Partitions
    database: Database[C]
    handler: Callable[[C, Message], object]
    inbox: InboxOf[C]
    batch: int
    attempts: int
    source: str
    stopping: threading.Event
    parks: bool
    #: by place: how often a message has failed, where the loop stops at last
    failures: Counter[str] = field(default_factory=Counter)
    #: by place: messages whose attempt was written beforehand, and how many attempts there were then
    counted: dict[str, tuple[Message, int]] = field(default_factory=dict)
    waits_in_a_row: int = 0
    looks_at: float = 0.0

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                self._step()
        except SystemExit:  # of a handler, as likely as not: its attempt counts
            self.counted.clear()
            raise
        except Unstorable as error:  # not a message is to blame, but the name of consumer or source
            raise error.__cause__ or error from None
        finally:
            try:
                self._take_attempts_back()
                self.partitions.close()
            finally:
                self.database.close()

    def _step(self) -> None:
        left = self.partitions.fetch(self.batch)  # what is handled is taken from it
        try:
            while left and not self.stopping.is_set():
                messages = self._readable(left)
                if not self._handle_together(left, messages):
                    self._handle_each(left, max(1, len(messages)))
            self._retry_parked()
            self.waits_in_a_row = 0
        except TryLater as error:
            if isinstance(error, LostInHandler):
                self.counted.clear()  # so that the next attempt is counted, too
                self.partitions.distrust()
            self._wait(left, error.__cause__)
        finally:
            self.partitions.go_back(left)

    def _wait(self, left: list[Record], why: object) -> None:
        _log.warning("waiting: %r", why)
        self.partitions.go_back(left)
        seconds = min(_SHORTEST_WAIT_SECONDS * 2**self.waits_in_a_row, _LONGEST_WAIT_SECONDS)
        self.waits_in_a_row = min(self.waits_in_a_row + 1, 10)
        left.clear()
        self.partitions.wait(seconds)

    def _readable(self, left: list[Record]) -> list[Message]:
        """Up to one without an id, or with a time that is none."""
        messages: list[Message] = []
        with suppress(ValueError):
            messages.extend(Message.from_confluent(record, source=self.source) for record in left)
        return messages

    def _handle_together(self, left: list[Record], messages: list[Message]) -> bool:
        """Whether they could be, in one transaction. Not the first of a partition: they may have ended a process."""
        records = left[: len(messages)]
        known = self.failures.keys() | self.counted.keys()
        if not messages or self.partitions.are_new(records) or (known and any(it.place in known for it in messages)):
            return False
        try:
            with self.database.transaction() as connection:
                fresh = self.inbox.once_many(connection, messages)
                for message in self.inbox.park_followers(connection, fresh):
                    self.database.call(self.handler, connection, message)
        except (HandlerFailed, Unstorable) as error:
            _log.info("a batch of %s failed, they are handled one by one: %r", len(messages), error.__cause__)
            return False
        self.partitions.done(records, at_once=False)
        del left[: len(messages)]
        return True

    def _handle_each(self, left: list[Record], count: int) -> None:
        """The first ``count``, one by one."""
        are_new, handled = self.partitions.are_new(left[:count]), 0
        try:
            for record in left[:count]:
                if self.stopping.is_set():
                    break
                self._handle_alone(record, is_suspect=are_new)
                handled += 1
        finally:
            # at once, so that a handler which ends the process in the next batch is among the first the next time
            self.partitions.done(left[:handled], at_once=are_new)
            del left[:handled]

    def _handle_alone(self, record: Record, *, is_suspect: bool) -> None:
        """Returns when it is handled or parked. Raises TryLater, PoisonMessage."""
        try:
            message = Message.from_confluent(record, source=self.source)
        except ValueError as error:
            self._give_up(Message.nameless(record, source=self.source), error)
            return
        is_suspect = is_suspect or message.place in self.counted
        try:
            if is_suspect and self._count_attempt(message) > self.attempts:
                self._give_up(message, DIED)
            else:
                self._handle(message, is_suspect=is_suspect)
        except HandlerFailed as failure:
            self._failed(message, failure)
        except Unstorable as error:
            self._give_up(Message.nameless(record, source=self.source), error.__cause__)
        self.failures.pop(message.place, None)
        self.counted.pop(message.place, None)

    def _handle(self, message: Message, *, is_suspect: bool) -> None:
        with self.database.transaction() as connection:
            if is_suspect:
                self.inbox.forget_attempts(connection, [message])
            if self.inbox.once(connection, message) and self.inbox.park_followers(connection, [message]):
                self.database.call(self.handler, connection, message)

    def _count_attempt(self, message: Message) -> int:
        """Once: while this process lives, nothing has ended it."""
        if message.place not in self.counted:
            with self.database.statements() as connection:
                self.counted[message.place] = message, self.inbox.count_attempt(connection, message)
        return self.counted[message.place][1]

    def _take_attempts_back(self) -> None:
        """Of messages that wait for the database, or a lock: this process ends, but not because of them."""
        if self.counted:
            with suppress(Exception), self.database.transaction() as connection:
                self.inbox.uncount_attempts(connection, [message for message, _ in self.counted.values()])

    def _failed(self, message: Message, failure: HandlerFailed) -> None:
        _log.warning("message %r at %s failed: %r", message.id, message.place, failure.__cause__)
        if self.parks:
            self._park(message, failure.__cause__, self.attempts)
            return
        self.failures[message.place] += 1
        if self.failures[message.place] >= self.attempts:
            self._give_up(message, failure.__cause__)
        raise TryLater from failure.__cause__

    def _give_up(self, message: Message, why: object) -> None:
        """What cannot be handled, however often it is tried. Raises PoisonMessage if that is not to be parked."""
        if self.parks:
            self._park(message, why, 1)
            return
        with self.database.transaction() as connection:  # who starts again, with another handler, begins to count again
            self.inbox.forget_attempts(connection, [message])
        raise PoisonMessage(message, why if isinstance(why, str) else repr(why))

    def _park(self, message: Message, why: object, attempts: int) -> None:
        with self.database.transaction() as connection:
            self.inbox.park(connection, message, why, attempts=attempts)
            self.inbox.forget_attempts(connection, [message])
        self.looks_at = min(self.looks_at, time.monotonic() + _SHORTEST_WAIT_SECONDS)

    def _retry_parked(self) -> None:
        """Those whose turn has come, each in a transaction of its own; for a while."""
        began, topics = time.monotonic(), self.partitions.topics()
        if began < self.looks_at or not topics:
            return
        self.looks_at = began + _LOOK_SECONDS
        while time.monotonic() < began + _RETRY_SECONDS and not self.stopping.is_set():
            asked = time.monotonic()
            with self.database.statements() as connection:
                message = self.inbox.due(connection, attempts=self.attempts, topics=topics)
            if message is None:
                if (time.monotonic() - asked) > _LOOK_SECONDS * _LOOK_SHARE:  # very many are parked
                    self.looks_at = asked + (time.monotonic() - asked) / _LOOK_SHARE
                return
            try:
                with self.database.transaction() as connection:
                    if self.inbox.retry(connection, message):
                        self.database.call(self.handler, connection, message)
            except HandlerFailed as failure:
                _log.warning("message %r at %s failed again: %r", message.id, message.place, failure.__cause__)
                self._park(message, failure.__cause__, self.attempts)
        self.looks_at = began  # there may be more


def _check(consumer: Consumer, inbox: object) -> None:
    """What can be told before anything is done. Raises ValueError, TypeError."""
    if isinstance(consumer, DeserializingConsumer):
        raise TypeError(
            "give a plain Consumer, and deserialize in the handler: what fails there is poison, and not lost"
        )
    if not isinstance(inbox, InboxOf):
        raise TypeError(
            "give an Inbox of psycopg, sqlalchemy or dbapi; with Django's connection psycopg's (see README.md)"
        )
    automatic = setting(consumer, "enable.auto.commit") if isinstance(consumer, Consumer) else None
    if automatic == "true":
        raise ValueError(
            "enable.auto.commit is true: offsets would be committed before messages are handled; turn it off"
        )
    if automatic is None:
        _log.warning("cannot tell how this consumer is configured: enable.auto.commit must be off")


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
