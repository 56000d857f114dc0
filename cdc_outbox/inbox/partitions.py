"""A consumer's side of Kafka: fetch, commit what is done, go back, wait. It survives rebalances and brokers away.

The only state is the next offset of each partition, and which are new. Nothing that was fetched is kept over a wait:
the consumer goes back to it, so that whoever has the partition then gets it.
"""

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

_Partition: TypeAlias = tuple[str, int]

_log: Final = logging.getLogger(__name__)
_POLL_SECONDS: Final = 0.2
_COMMIT_SECONDS: Final = 3.0
#: What waiting does not help.
_OPERATOR: Final = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.FENCED_INSTANCE_ID,
        KafkaError.INVALID_GROUP_ID,
        KafkaError._AUTO_OFFSET_RESET,  # noqa: SLF001 - librdkafka's own codes are named so
    }
)
#: No news: a partition's end; a batch that took longer than max.poll.interval.ms, after which the next poll rejoins.
_PASSED_OVER: Final = frozenset({KafkaError._PARTITION_EOF, KafkaError._MAX_POLL_EXCEEDED})  # noqa: SLF001


class Partitions:
    def __init__(self, consumer: Consumer, stopping: threading.Event) -> None:
        self._consumer = consumer
        self._stopping = stopping
        #: of partitions that are assigned, and that something was handled of
        self._next: dict[_Partition, int] = {}
        #: the same of all that were ever assigned
        self._was: dict[_Partition, int] = {}
        self._assigned: set[_Partition] = set()
        #: assigned, and nothing was handled yet
        self._new: set[_Partition] = set()

    def subscribe(self, topics: Sequence[str]) -> None:
        self._consumer.subscribe(list(topics), on_revoke=self._on_revoke, on_lost=self._on_lost)

    def fetch(self, count: int) -> list[Message]:
        """What is there, up to ``count``; waits a little if there is nothing. Raises KafkaException."""
        first = self._consumer.poll(_POLL_SECONDS)
        rest = self._consumer.consume(count - 1, 0) if first is not None and count > 1 else []
        self._look_at_assignment()
        if first is None:
            return []
        messages = [message for message in (first, *rest) if message.error() is None]
        try:
            for message in (first, *rest):
                _is_error(message.error())
        except KafkaException:
            self.go_back(messages)
            raise
        for place, offset in _first_offsets(messages).items() if self._new else ():
            if self._was.get(place) == offset:  # it comes back where it was: no offset was committed in between
                self._new.discard(place)
        return messages

    def are_new(self, messages: Iterable[Message]) -> bool:
        """Whether one of them is of a partition that was assigned, and of which nothing was handled yet."""
        return bool(self._new) and any(_partition(message) in self._new for message in messages)

    def distrust(self) -> None:
        """What comes next of any partition counts as the first."""
        self._new = set(self._assigned)
        self._was.clear()

    def topics(self) -> list[str]:
        """Of which partitions are assigned."""
        return sorted({topic for topic, _ in self._assigned})

    def done(self, messages: Sequence[Message], *, at_once: bool) -> None:
        """They are handled: commit their offsets, and wait until that is known if it is to be ``at_once``."""
        offsets = {_partition(message): _offset(message) + 1 for message in messages}
        self._new -= offsets.keys()
        self._was |= offsets
        mine = self._mine() if offsets else set()
        self._next |= {place: offset for place, offset in offsets.items() if place in mine}
        self._commit(offsets, at_once=at_once)

    def go_back(self, messages: Iterable[Message]) -> None:
        """The next to be fetched are these again; but of partitions that were revoked."""
        for (topic, number), offset in _first_offsets(messages).items():
            try:
                self._consumer.seek(TopicPartition(topic, number, offset))
            except KafkaException as error:
                _log.debug("cannot go back to %s[%s]@%s: %s", topic, number, offset, error)

    def wait(self, seconds: float) -> None:
        """Fetch nothing, but keep polling, so that the group knows that this consumer lives."""
        deadline = time.monotonic() + seconds
        while not self._stopping.is_set() and (left := deadline - time.monotonic()) > 0:
            self._consumer.pause(self._consumer.assignment())  # each time: another may have been assigned
            message = self._consumer.poll(min(left, _POLL_SECONDS))
            if message is not None and not _is_error(message.error()):
                self.go_back([message])
        self._consumer.resume(self._consumer.assignment())
        self._assigned &= self._mine()  # what is away now, and comes back, will have to be resumed then

    def close(self) -> None:
        """Commit all that is done, and wait for it, but not for long."""
        self._commit(self._next, at_once=True)
        self._next.clear()

    def _commit(self, offsets: dict[_Partition, int], *, at_once: bool) -> None:
        # of no other: somebody else may be far beyond it by now, and the broker would take it all the same
        mine = self._mine() if offsets else set()
        places = [TopicPartition(*place, offset) for place, offset in offsets.items() if place in mine]
        if not places:
            return
        try:
            if at_once:
                # asked first: without a broker a commit waits as long as the session lasts, and so does closing then
                self._consumer.committed(places, timeout=_COMMIT_SECONDS)
                self._consumer.commit(offsets=places, asynchronous=False)
            else:
                self._consumer.commit(offsets=places)
        except KafkaException as error:
            # Another one has the partition, the group is rebalancing, or the broker is away: what is committed later
            # covers this, and what is not comes again, which the inbox knows.
            _raise_if_operator(error.args[0])
            _log.info("offsets were not committed, which is harmless: %s", error)

    def _on_revoke(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        mine = [(place.topic, place.partition) for place in partitions]
        self._commit({place: self._next[place] for place in mine if place in self._next}, at_once=True)
        self._on_lost(_consumer, partitions)

    def _on_lost(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        for place in partitions:
            self._next.pop((place.topic, place.partition), None)

    def _look_at_assignment(self) -> None:
        """What came is new. One that was paused, revoked and comes back is paused still."""
        assigned = self._mine()
        if assigned == self._assigned:
            return
        self._consumer.resume([TopicPartition(*place) for place in assigned])
        self._new = (self._new | (assigned - self._assigned)) & assigned
        self._next = {place: offset for place, offset in self._next.items() if place in assigned}
        self._assigned = assigned

    def _mine(self) -> set[_Partition]:
        return {(place.topic, place.partition) for place in self._consumer.assignment()}


def _first_offsets(messages: Iterable[Message]) -> dict[_Partition, int]:
    return {_partition(message): _offset(message) for message in reversed([*messages])}


def _is_error(error: KafkaError | None) -> bool:
    """Raises KafkaException for what waiting does not help."""
    if error is None:
        return False
    _raise_if_operator(error)
    if error.code() not in _PASSED_OVER:
        _log.warning("Kafka: %s", error)
    return True


def _raise_if_operator(error: KafkaError) -> None:
    if error.fatal() or error.code() in _OPERATOR:
        raise KafkaException(error)


def _partition(message: Message) -> _Partition:
    topic, number = message.topic(), message.partition()
    assert topic is not None and number is not None  # noqa: PT018 - a consumed one has both
    return topic, number


def _offset(message: Message) -> int:
    offset = message.offset()
    assert offset is not None
    return offset
