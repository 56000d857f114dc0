"""The reader: what Kafka holds at the end of a scenario, as the checker wants it."""

from typing import Any, Final

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from fault.checker import Record
from support.waiting import wait_until

_NO_LEADER_YET: Final = (KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE)


def _record(message: Message) -> Record:
    headers: list[tuple[str, Any]] = list(message.headers() or [])  # type: ignore[arg-type] # never a dict on receipt
    names = dict(headers)
    key = message.key() or b""
    return Record(
        event_id=names["id"].decode(),
        aggregate=(str(message.topic()), key.decode() if isinstance(key, bytes) else key),
        appended_at=message.timestamp()[1] / 1000,
        redriven="cdc-outbox-redriven" in names,
    )


def _end_of(consumer: Consumer, place: TopicPartition) -> int:
    """The offset after the last record."""
    watermarks = wait_until(lambda: _watermarks(consumer, place), f"{place.topic} has leaders", timeout_seconds=30)
    assert watermarks
    return watermarks[1]


def _watermarks(consumer: Consumer, place: TopicPartition) -> tuple[int, int] | None:
    """None as long as a broker that has just come back does not lead the partition."""
    try:
        low, high = consumer.get_watermark_offsets(place, timeout=10)
    except KafkaException as error:
        if error.args[0].code() in _NO_LEADER_YET:
            return None
        raise
    return int(low), int(high)


def read_to_the_end(bootstrap_servers: str, topics: list[str]) -> list[Record]:
    """All records that are there now, those of each partition in their order."""
    settings = {"bootstrap.servers": bootstrap_servers, "group.id": "reader", "auto.offset.reset": "earliest"}
    consumer = Consumer({**settings, "enable.auto.commit": False})
    records: list[Record] = []
    try:
        metadata = consumer.list_topics(timeout=10).topics
        places = [TopicPartition(topic, number, 0) for topic in topics for number in metadata[topic].partitions]
        ends = {(place.topic, place.partition): _end_of(consumer, place) for place in places}
        open_ends = {place: end for place, end in ends.items() if end}
        consumer.assign([place for place in places if (place.topic, place.partition) in open_ends])

        def complete() -> bool:
            for message in consumer.consume(10_000, timeout=0.2):
                assert not message.error(), message.error()
                records.append(_record(message))
                place = (str(message.topic()), int(message.partition() or 0))
                if int(message.offset() or 0) + 1 >= open_ends.get(place, 0):
                    open_ends.pop(place, None)
            return not open_ends

        wait_until(complete, "the ends of all partitions", timeout_seconds=60)
    finally:
        consumer.close()
    return records
