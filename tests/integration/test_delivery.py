"""The publisher against a real broker."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from cdc_outbox.demo.ports import free_port
from cdc_outbox.errors import BatchRefused, BrokerUnavailable, CdcOutboxError, OperatorNeeded, PoisonEvent
from cdc_outbox.kafka.acknowledged import AcknowledgedDelivery
from cdc_outbox.kafka.opening import partition_of
from cdc_outbox.kafka.topics import Topics
from support.waiting import wait_until
from support.world import create_topic, read_topic

INCOMPRESSIBLE = b"".join(uuid.uuid4().bytes for _ in range(500))


@pytest.fixture
def publisher(kafka: str) -> Iterator[AcknowledgedDelivery]:
    made = AcknowledgedDelivery(kafka, {}, max_in_flight=1000)
    yield made
    made.close()


@pytest.fixture
def topic(kafka: str) -> str:
    name = f"test.{uuid.uuid4().hex}"
    create_topic(kafka, name)
    return name


def flush(publisher: AcknowledgedDelivery) -> None:
    def empty() -> bool:
        publisher.flush(0.1)
        return not publisher.in_flight

    wait_until(empty, "nothing is in flight")


def test_keys_and_partitions_are_those_of_a_java_producer(
    publisher: AcknowledgedDelivery, topic: str, kafka: str
) -> None:
    keys = [b"", b"a", b"abc", "grüße".encode(), b"0123456789" * 30, *(b"order-%d" % number for number in range(500))]
    delivered: list[Any] = []
    for key in keys:
        publisher.publish(topic, b"v", key, -1, lambda error, _: delivered.append(error), None, 1000, [("id", b"1")])
    flush(publisher)
    assert delivered == [None] * len(keys)
    messages = read_topic(kafka, topic, len(keys))
    assert sorted(message.key() or b"" for message in messages) == sorted(keys)
    assert {message.partition() for message in messages} == set(range(6))
    for message in messages:
        used = message.key() or b""
        assert isinstance(used, bytes)
        assert message.partition() == partition_of(used, 6), used


def test_value_headers_and_timestamp_arrive_as_they_were_given(
    publisher: AcknowledgedDelivery, topic: str, kafka: str
) -> None:
    headers = [("id", b"1"), ("type", None), ("ä", "ö".encode()), ("id", b"again")]
    publisher.publish(topic, b"\x00\xff", b"k", -1, publisher_callback, None, 1_714_979_289_123, headers)
    publisher.publish(topic, None, b"k", -1, publisher_callback, None, 1_714_979_289_123, [])
    flush(publisher)
    first, tombstone = read_topic(kafka, topic, 2)
    assert (first.value(), first.timestamp()[1], first.headers()) == (b"\x00\xff", 1_714_979_289_123, headers)
    assert tombstone.value() is None


def publisher_callback(error: Any, _message: Any) -> None:
    assert error is None


def test_no_broker(kafka: str) -> None:
    publisher = AcknowledgedDelivery(f"127.0.0.1:{free_port()}", {}, max_in_flight=10)
    with pytest.raises(BrokerUnavailable, match="no broker answers at 127"):
        publisher.connect(0.5)
    publisher.close()


def test_topics_are_required(publisher: AcknowledgedDelivery, topic: str) -> None:
    topics = Topics(publisher, create=False)
    topics.connect()
    topics.require(topic)
    with pytest.raises(OperatorNeeded, match=r"topic test\.nope does not exist") as caught:
        topics.require("test.nope")
    assert "kafka.create_topics" in caught.value.hint


def test_topics_are_created_when_asked(publisher: AcknowledgedDelivery, kafka: str) -> None:
    name = f"test.{uuid.uuid4().hex}"
    topics = Topics(publisher, create=True)
    topics.require(name)
    publisher.publish(name, b"v", b"k", -1, publisher_callback, None, 0, [])
    flush(publisher)
    assert len(read_topic(kafka, name, 1)) == 1


def test_a_topic_that_cannot_be_created_is_named(publisher: AcknowledgedDelivery) -> None:
    with pytest.raises(OperatorNeeded, match="topic no/topic cannot be created"):
        Topics(publisher, create=True).require("no/topic")


def reports_to(publisher: AcknowledgedDelivery, delivered: list[bytes]) -> Callable[[Any, Any], None]:
    def on_delivery(error: Any, message: Any) -> None:
        if error is not None:
            publisher.on_failure(error, message)
        delivered.append(message.value())

    return on_delivery


def test_a_batch_refused_for_good_names_no_culprit_and_nothing_passes_it(
    publisher: AcknowledgedDelivery, kafka: str
) -> None:
    name = f"test.{uuid.uuid4().hex}"
    create_topic(kafka, name, partitions=1, **{"max.message.bytes": "2000"})
    delivered: list[bytes] = []
    on_delivery = reports_to(publisher, delivered)

    def publish(value: bytes) -> None:
        publisher.publish(name, value, b"k", -1, on_delivery, None, 0, [("id", b"e-1")])

    publish(b"small")
    flush(publisher)
    publish(INCOMPRESSIBLE)
    for _ in range(20):
        publish(b"after")
    with pytest.raises(BatchRefused, match=rf"topic {name} refuses an event, or one sent with it: MSG_SIZE"):
        flush(publisher)
    assert delivered == [b"small"]
    assert [message.value() for message in read_topic(kafka, name, 1)] == [b"small"]


def test_nothing_passes_a_new_producers_first_event_in_a_partition(kafka: str) -> None:
    """Sent each at once: two batches are then in flight before the first is refused, if they may."""
    name = f"test.{uuid.uuid4().hex}"
    create_topic(kafka, name, partitions=1, **{"max.message.bytes": "2000"})
    publisher = AcknowledgedDelivery(kafka, {"linger.ms": 0}, max_in_flight=10)
    publisher.connect(10)
    publisher.begin_topic(name)
    on_delivery = reports_to(publisher, [])
    publisher.publish(name, INCOMPRESSIBLE, b"k", -1, on_delivery, None, 0, [])

    def passes() -> bool:
        with suppress(BufferError):
            publisher.publish(name, b"after", b"k", -1, on_delivery, None, 0, [])
        publisher.poll(0.001)
        return False

    with pytest.raises(BatchRefused):
        wait_until(passes, "a refusal")
    publisher.close()
    assert not read_topic(kafka, name, 0)


def test_a_producer_that_died_of_a_refusal_says_so_at_the_next_publish(
    publisher: AcknowledgedDelivery, kafka: str
) -> None:
    """Before any report was served, and whether or not one can be."""
    name = f"test.{uuid.uuid4().hex}"
    create_topic(kafka, name, partitions=1, **{"max.message.bytes": "2000"})

    def refused() -> BaseException | None:
        try:
            publisher.publish(name, b"after", b"k", -1, lambda _error, _message: None, None, 0, [])
        except publisher.refusal as error:
            return error
        return None

    publisher.publish(name, INCOMPRESSIBLE, b"k", -1, lambda _error, _message: None, None, 0, [])
    refusal = wait_until(refused, "the producer is dead")
    assert isinstance(publisher.explain(refusal, name), BatchRefused)


def test_one_by_one_the_refused_event_is_found_and_the_others_arrive(
    publisher: AcknowledgedDelivery, kafka: str
) -> None:
    name = f"test.{uuid.uuid4().hex}"
    create_topic(kafka, name, partitions=1, **{"max.message.bytes": "2000"})

    def publish(value: bytes) -> None:
        publisher.publish(name, value, b"k", -1, publisher_callback, None, 0, [("id", b"e-1")])

    def settle() -> CdcOutboxError | None:
        while not isolation.is_settled():
            publisher.poll(0.05)
        assert publisher.in_flight == 0
        return isolation.refusal

    isolation = publisher.isolate()
    for number in range(5):
        publish(b"before %d" % number)
        assert settle() is None
        publish(INCOMPRESSIBLE)
        error = settle()
        assert isinstance(error, PoisonEvent)
        assert error.reason == "MSG_SIZE_TOO_LARGE"
    assert isolation.refused == 5
    publisher.publish_in_batches()
    publish(b"after")
    flush(publisher)
    values = [message.value() for message in read_topic(kafka, name, 6)]
    assert values == [*(b"before %d" % number for number in range(5)), b"after"]


def test_what_the_client_refuses_is_poison(kafka: str, topic: str) -> None:
    publisher = AcknowledgedDelivery(kafka, {"message.max.bytes": 2000}, max_in_flight=10)
    with pytest.raises(publisher.refusal) as caught:
        publisher.publish(topic, b"x" * 3000, b"k", -1, publisher_callback, None, 0, [])
    error = publisher.explain(caught.value, topic)
    assert isinstance(error, PoisonEvent)
    assert "MSG_SIZE_TOO_LARGE" in error.message
    publisher.close()


def test_in_flight_is_bounded(kafka: str, topic: str) -> None:
    publisher = AcknowledgedDelivery(kafka, {}, max_in_flight=10)
    for _ in range(10):
        publisher.publish(topic, b"v", b"k", -1, publisher_callback, None, 0, [])
    with pytest.raises(BufferError):
        publisher.publish(topic, b"v", b"k", -1, publisher_callback, None, 0, [])
    assert publisher.in_flight >= 10
    flush(publisher)
    publisher.publish(topic, b"v", b"k", -1, publisher_callback, None, 0, [])
    flush(publisher)
