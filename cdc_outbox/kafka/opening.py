"""Opening partitions: of each, a new producer's first event is acknowledged before its second one is sent.

A broker that has nothing of a producer yet takes any sequence number from it. If it refuses the first batch, it takes
the second one that was in flight behind it: events pass the refused one. Once it has an event, it takes nothing that
has a gap before it. librdkafka's gapless guarantee is no help: it comes too late for what is in flight.
Tried on Kafka 4.3: behind a first batch that was refused, later events were taken in 28 of 30 times, behind a second
one in none of 150.

A broker forgets a producer that has sent nothing to a partition for `producer.id.expiration.ms` (a day), or of which no
record is left there: its next event to that partition is then as a first one, and not guarded.
Source: Kafka's ProducerAppendInfo.checkSequence ("accept writes with any sequence number").
"""

from collections.abc import Callable
from typing import Any, Final

#: Of the shape of confluent_kafka.Producer.produce.
Produce = Callable[..., None]

_UINT32: Final = 0xFFFFFFFF


class _Topic:
    """One whose partitions are not all open yet."""

    def __init__(self, partitions: int) -> None:
        self.partitions = partitions
        #: partitions of which no event was acknowledged yet; those whose first one is in flight
        self.closed = set(range(partitions))
        self.opening: set[int] = set()
        #: keys of partitions that are open
        self.open_keys: set[bytes] = set()


class Opening:
    """``publish`` stands around ``produce`` until ``is_done``. Partitions that are added later are not looked at."""

    def __init__(self, produce: Produce) -> None:
        self._produce = produce
        self._topics: dict[str, _Topic] = {}

    def add(self, topic: str, partitions: int) -> None:
        """Before its first event."""
        self._topics[topic] = _Topic(partitions)

    @property
    def is_done(self) -> bool:
        return not self._topics

    def publish(
        self,
        name: str,
        value: bytes | None,
        key: bytes,
        partition: int,
        on_delivery: Callable[[Any, Any], None],
        _: None,
        timestamp_ms: int,
        headers: Any,
    ) -> None:
        """Raises BufferError as long as the first event of the key's partition is in flight."""
        topic = self._topics.get(name)
        # Some topics have few keys, and so partitions that stay closed: this is their hot path.
        if topic is None or key in topic.open_keys:
            self._produce(name, value, key, partition, on_delivery, None, timestamp_ms, headers)
            return
        number = partition_of(key, topic.partitions)
        if number in topic.opening:
            raise BufferError
        is_first = number in topic.closed
        if is_first:
            on_delivery = _opened_by(on_delivery, name, number, self._topics)
        else:
            topic.open_keys.add(key)
        self._produce(name, value, key, partition, on_delivery, None, timestamp_ms, headers)
        if is_first:
            topic.opening.add(number)


def _opened_by(
    on_delivery: Callable[[Any, Any], None], name: str, number: int, topics: dict[str, _Topic]
) -> Callable[[Any, Any], None]:
    # It holds no `Opening`: as long as it is not called, that would hold the producer with its threads.
    def delivered(error: Any, message: Any) -> None:
        if error is None:
            topic = topics[name]
            topic.opening.discard(number)
            topic.closed.discard(number)
            if not topic.closed:
                del topics[name]
        on_delivery(error, message)

    return delivered


def partition_of(key: bytes, partitions: int) -> int:
    """As a Java producer and librdkafka's ``murmur2_random`` choose it.

    Source: org.apache.kafka.common.utils.Utils.murmur2, and BuiltInPartitioner.partitionForKey.
    """
    return (_murmur2(key) & 0x7FFFFFFF) % partitions


def _murmur2(data: bytes) -> int:
    whole = len(data) // 4 * 4
    hashed = 0x9747B28C ^ len(data)
    for start in range(0, whole, 4):
        word = int.from_bytes(data[start : start + 4], "little") * 0x5BD1E995 & _UINT32
        word = (word ^ word >> 24) * 0x5BD1E995 & _UINT32
        hashed = hashed * 0x5BD1E995 & _UINT32 ^ word
    if tail := data[whole:]:
        hashed = (hashed ^ int.from_bytes(tail, "little")) * 0x5BD1E995 & _UINT32
    hashed = (hashed ^ hashed >> 13) * 0x5BD1E995 & _UINT32
    return hashed ^ hashed >> 15
