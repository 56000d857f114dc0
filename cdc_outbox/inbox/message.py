"""A message as the consumer got it: what the inbox needs to know of it. Standard library only.

``id`` is the event's own, the same on every copy of it. It is read from the header ``id`` (the relay's styles *plain*
and *debezium*) or ``ce_id`` (*cloudevents*); a message without one is never guessed an id.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Protocol, Self, TypeAlias

#: confluent_kafka.TIMESTAMP_CREATE_TIME, and aiokafka's.
_CREATE_TIME_CONFLUENT: Final = 1
_CREATE_TIME_AIOKAFKA: Final = 0
#: With the consumer's name they must fit into PostgreSQL's index, which takes 2,704 bytes.
_LONGEST_ID_BYTES: Final = 1_000
_LONGEST_SOURCE_BYTES: Final = 500

Headers: TypeAlias = Mapping[str, Any] | Iterable[tuple[str, Any]]
#: Topic, partition, offset.
_Place: TypeAlias = tuple[str, int | None, int | None]


class NoMessageId(ValueError):
    """The message has no id: another producer wrote it, or a header was lost. It cannot be told from its copies."""


class ConfluentMessage(Protocol):
    """``confluent_kafka.Message``."""

    def error(self) -> Any: ...
    def headers(self) -> Any: ...
    def key(self) -> Any: ...
    def value(self) -> Any: ...
    def timestamp(self) -> tuple[int, int]: ...
    def topic(self) -> str | None: ...
    def partition(self) -> int | None: ...
    def offset(self) -> int | None: ...


class AiokafkaRecord(Protocol):
    """``aiokafka.ConsumerRecord``."""

    @property
    def headers(self) -> Any: ...
    @property
    def key(self) -> Any: ...
    @property
    def value(self) -> Any: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def timestamp_type(self) -> int: ...
    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...


class FaststreamMessage(Protocol):
    """``faststream.kafka.KafkaMessage`` or ``faststream.confluent.KafkaMessage``, of one record."""

    @property
    def raw_message(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Message:
    """One delivery of an event.

    ``committed_at`` is the time of the transaction that wrote it, the same on every copy; None where the topic stamps
    records itself (LogAppendTime), which an inbox that is partitioned refuses. ``source`` tells apart producers whose
    ids are not unique among each other (a bigserial in two databases); it stays empty for UUIDs. ``value`` is as the
    client gives it, bytes or what its deserializer made; None in a tombstone. ``type`` is None where the relay's style
    is *debezium*.
    """

    id: str
    committed_at: datetime | None
    key: str | None = None
    value: Any = None
    type: str | None = None
    source: str = ""
    #: the relay's own, which orders an aggregate's events; None where it is not turned on
    sequence: str | None = None
    topic: str = ""
    partition: int | None = None
    offset: int | None = None
    headers: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limits = (("id", self.id, _LONGEST_ID_BYTES), ("source", self.source, _LONGEST_SOURCE_BYTES))
        for name, value, longest in limits:
            if not is_storable(value, longest_bytes=longest):
                raise NoMessageId(f"the message's {name} has a NUL in it, is no text, or has over {longest} bytes")
        if not self.id:
            raise NoMessageId("the message's id is empty")
        if self.committed_at and self.committed_at.tzinfo is None:
            raise ValueError("committed_at has no time zone; datetime.fromtimestamp(..., UTC) has one")

    @property
    def redriven(self) -> bool:
        """It was a dead letter once: later events of its aggregate may have come before it."""
        return "cdc-outbox-redriven" in self.headers

    @property
    def place(self) -> str:
        """In Kafka, as people write it: ``orders[3]@1200``."""
        return name_of(self.topic, self.partition, self.offset)

    @classmethod
    def nameless(cls, record: ConfluentMessage | AiokafkaRecord, *, source: str = "") -> Self:
        """Of a record without an id: to be parked, under the name of its place. Two copies of an event are two."""

        def part(name: str) -> Any:
            given = getattr(record, name)
            return given() if callable(given) else given

        topic, partition, offset, timestamp = (part(name) for name in ("topic", "partition", "offset", "timestamp"))
        timestamp_ms = timestamp[1] if isinstance(timestamp, tuple) else timestamp
        try:
            recorded_at = _time(timestamp_ms, (topic, partition, offset))
        except ValueError:
            recorded_at = datetime.fromtimestamp(0, UTC)
        return cls(
            f"{topic}:{partition}:{offset}:{timestamp_ms}",  # to be pasted into a shell as it is
            recorded_at,
            key=_text(part("key")),
            value=part("value"),
            source=source,
            topic=topic,
            partition=partition,
            offset=offset,
            headers={name: _text(content) for name, content in part("headers") or ()},
        )

    @classmethod
    def from_headers(  # noqa: PLR0913 - a record has that many parts
        cls,
        headers: Headers,
        *,
        key: str | bytes | None,
        value: Any,
        committed_at: datetime | None,
        source: str = "",
        topic: str = "",
        partition: int | None = None,
        offset: int | None = None,
    ) -> Self:
        """From a record of any client. Of several headers that could be the id the first is: the relay's come first.

        Who parks, or asks for what is ``newer``, gives the topic: it is a part of the aggregate's name.

        Raises NoMessageId.
        """
        contents: dict[str, Any] = {}
        for name, content in headers.items() if isinstance(headers, Mapping) else headers:
            contents.setdefault(name, content)
        id_name = next((name for name in contents if name in ("id", "ce_id")), None)
        if id_name is None or not contents[id_name]:
            raise NoMessageId(f"no header id or ce_id; there are: {', '.join(contents) or 'none'}")
        prefix = id_name.removesuffix("id")
        texts = {name: _text(content) for name, content in contents.items()}
        return cls(
            _id(contents[id_name]),
            committed_at,
            key=_text(key),
            value=value,
            type=texts.get(f"{prefix}type"),
            source=source,
            sequence=texts.get(f"{prefix}sequence"),
            topic=topic,
            partition=partition,
            offset=offset,
            headers=texts,
        )

    @classmethod
    def from_confluent(cls, message: ConfluentMessage, *, source: str = "") -> Self:
        """Raises as ``from_aiokafka``; ValueError if it is no message but an error, which ``poll`` returns alike."""
        if message.error() is not None:
            raise ValueError(f"not a message, but an error: {message.error()}")
        kind, timestamp_ms = message.timestamp()
        place = (message.topic() or "", message.partition(), message.offset())
        committed_at = _time(timestamp_ms, place) if kind == _CREATE_TIME_CONFLUENT else None
        return cls._of_record(message.headers(), message.key(), message.value(), committed_at, source, place)

    @classmethod
    def from_aiokafka(cls, record: AiokafkaRecord, *, source: str = "") -> Self:
        """Raises NoMessageId; ValueError for a timestamp that is none."""
        place = (record.topic, record.partition, record.offset)
        committed_at = _time(record.timestamp, place) if record.timestamp_type == _CREATE_TIME_AIOKAFKA else None
        return cls._of_record(record.headers, record.key, record.value, committed_at, source, place)

    @classmethod
    def from_faststream(cls, message: FaststreamMessage, *, source: str = "") -> Self:
        """Of either of its Kafka brokers. Raises as ``from_aiokafka``; TypeError for a batch."""
        raw = message.raw_message
        if isinstance(raw, tuple | list):
            raise TypeError("a batch of messages: give each of its raw_message to from_aiokafka or from_confluent")
        from_client = cls.from_confluent if callable(raw.headers) else cls.from_aiokafka
        return from_client(raw, source=source)

    @classmethod
    def _of_record(
        cls, headers: Headers | None, key: Any, value: Any, committed_at: datetime | None, source: str, place: _Place
    ) -> Self:
        topic, partition, offset = place
        try:
            return cls.from_headers(
                headers or (),
                key=key,
                value=value,
                committed_at=committed_at,
                source=source,
                topic=topic,
                partition=partition,
                offset=offset,
            )
        except NoMessageId as error:
            raise NoMessageId(f"message {name_of(*place)}: {error}") from None


def name_of(topic: str, partition: int | None, offset: int | None) -> str:
    """Of a record's place, as people write it: ``orders[3]@1200``."""
    return f"{topic}[{partition}]@{offset}"


def is_storable(text: str, *, longest_bytes: int) -> bool:
    """Whether PostgreSQL keeps it in an index."""
    try:
        return "\0" not in text and len(text.encode()) <= longest_bytes
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def _time(timestamp_ms: int, place: _Place) -> datetime:
    try:
        return datetime.fromtimestamp(timestamp_ms / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        raise ValueError(
            f"message {name_of(*place)}: its timestamp {timestamp_ms} is no time in milliseconds"
        ) from None


def _id(content: str | bytes) -> str:
    """Never with a character in the place of another: two ids would become one."""
    try:
        return content.decode() if isinstance(content, bytes) else content
    except UnicodeDecodeError:
        raise NoMessageId("the id is no text in UTF-8") from None


def _text(content: str | bytes | None) -> str | None:
    """Bytes that are no text are escaped: two keys that differ must not become one."""
    return content.decode(errors="backslashreplace") if isinstance(content, bytes) else content
