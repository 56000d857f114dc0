"""A new producer's first event to each partition goes alone; nothing waits for partitions that are open."""

from collections.abc import Callable
from typing import Any

import pytest

from cdc_outbox.kafka.opening import Opening, partition_of


class Sent(list[tuple[bytes, Callable[[Any, Any], None]]]):
    """Takes what is published, and whom to tell."""

    def produce(self, *record: Any) -> None:
        self.append((record[2], record[4]))

    def acknowledge(self, number: int = 0, error: object = None) -> None:
        self[number][1](error, None)


@pytest.fixture
def sent() -> Sent:
    return Sent()


@pytest.fixture
def opening(sent: Sent) -> Opening:
    made = Opening(sent.produce)
    made.add("t", 3)
    return made


def publish(opening: Opening, key: bytes, topic: str = "t") -> None:
    opening.publish(topic, b"v", key, -1, lambda _error, _message: None, None, 0, [])


def keys_of(partition: int) -> list[bytes]:
    """A few keys that go to it."""
    return [key for key in (b"%d" % number for number in range(100)) if partition_of(key, 3) == partition][:3]


def test_a_second_event_of_a_partition_waits_for_the_first(opening: Opening, sent: Sent) -> None:
    first, second, _ = keys_of(0)
    publish(opening, first)
    for key in (first, second):
        with pytest.raises(BufferError):
            publish(opening, key)
    publish(opening, keys_of(1)[0])
    assert [key for key, _ in sent] == [first, keys_of(1)[0]], "other partitions do not wait"
    sent.acknowledge()
    publish(opening, first)
    publish(opening, second)
    publish(opening, second)
    assert len(sent) == 5


def test_it_is_done_when_all_partitions_of_all_topics_are_open(opening: Opening, sent: Sent) -> None:
    opening.add("u", 1)
    for partition in range(3):
        assert not opening.is_done
        publish(opening, keys_of(partition)[0])
        sent.acknowledge(partition)
    assert not opening.is_done
    publish(opening, b"any", "u")
    sent.acknowledge(3)
    assert opening.is_done


def test_a_failed_first_event_opens_nothing(opening: Opening, sent: Sent) -> None:
    publish(opening, b"k")
    sent.acknowledge(error="refused")
    with pytest.raises(BufferError):
        publish(opening, b"k")


def test_an_event_that_was_not_taken_is_not_waited_for(opening: Opening, sent: Sent) -> None:
    full = Opening(lambda *_: (_ for _ in ()).throw(BufferError))
    full.add("t", 3)
    with pytest.raises(BufferError):
        publish(full, b"k")
    full._produce = sent.produce
    publish(full, b"k")
    assert len(sent) == 1


def test_other_topics_pass(opening: Opening, sent: Sent) -> None:
    publish(opening, b"k", "canary")
    publish(opening, b"k", "canary")
    assert len(sent) == 2
