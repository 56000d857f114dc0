"""A message as the consumer got it: what the inbox needs to know of it. Standard library only.

``id`` is the event's own, the same on every copy of it. It is read from the header ``id`` (the relay's styles *plain*
and *debezium*) or ``ce_id`` (*cloudevents*); a message without one is never guessed an id.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol, Self, TypeAlias

Headers: TypeAlias = Mapping[str, Any] | Iterable[tuple[str, Any]]


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

    ``committed_at`` is the time of the transaction that wrote it, the same on every copy. ``source`` tells apart
    producers whose ids are not unique among each other (a bigserial in two databases); it stays empty for UUIDs.
    ``value`` is None in a tombstone. ``type`` is None where the relay's style is *debezium*.
    """

    id: str
    committed_at: datetime
    key: str | None = None
    value: bytes | None = None
    type: str | None = None
    source: str = ""
    #: the relay's own, which orders an aggregate's events; None where it is not turned on
    sequence: str | None = None
    headers: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id:
            raise NoMessageId("the message's id is empty")
        if "\0" in self.id or "\0" in self.source:
            raise NoMessageId("the message's id or source has a NUL in it, which PostgreSQL cannot keep")
        if self.committed_at.tzinfo is None:
            raise ValueError("committed_at has no time zone; datetime.fromtimestamp(..., UTC) has one")

    @property
    def redriven(self) -> bool:
        """It was a dead letter once: later events of its aggregate may have come before it."""
        return "cdc-outbox-redriven" in self.headers

    @classmethod
    def from_headers(
        cls, headers: Headers, *, key: str | bytes | None, value: Any, committed_at: datetime, source: str = ""
    ) -> Self:
        """From a record of any client. Of several headers of one name the first counts: the relay's come first.

        Raises NoMessageId.
        """
        texts: dict[str, str | None] = {}
        for name, content in headers.items() if isinstance(headers, Mapping) else headers:
            texts.setdefault(name, _text(content))
        message_id = texts.get("id") or texts.get("ce_id")
        if not message_id:
            raise NoMessageId(f"no header id or ce_id; there are: {', '.join(texts) or 'none'}")
        return cls(
            message_id,
            committed_at,
            key=_text(key),
            value=value,
            type=texts.get("type") or texts.get("ce_type"),
            source=source,
            sequence=texts.get("sequence") or texts.get("ce_sequence"),
            headers=texts,
        )

    @classmethod
    def from_confluent(cls, message: ConfluentMessage, *, source: str = "") -> Self:
        """Raises NoMessageId; ValueError if it is no message but an error, which ``poll`` returns alike."""
        if message.error() is not None:
            raise ValueError(f"not a message, but an error: {message.error()}")
        _, timestamp_ms = message.timestamp()
        place = f"{message.topic()}[{message.partition()}]@{message.offset()}"
        return cls._of_record(message.headers(), message.key(), message.value(), timestamp_ms, source, place)

    @classmethod
    def from_aiokafka(cls, record: AiokafkaRecord, *, source: str = "") -> Self:
        """Raises NoMessageId."""
        place = f"{record.topic}[{record.partition}]@{record.offset}"
        return cls._of_record(record.headers, record.key, record.value, record.timestamp, source, place)

    @classmethod
    def from_faststream(cls, message: FaststreamMessage, *, source: str = "") -> Self:
        """Of either of its Kafka brokers. Raises NoMessageId; TypeError for a batch."""
        raw = message.raw_message
        if isinstance(raw, tuple | list):
            raise TypeError("a batch of messages: give each of its raw_message to from_aiokafka or from_confluent")
        from_client = cls.from_confluent if callable(raw.headers) else cls.from_aiokafka
        return from_client(raw, source=source)

    @classmethod
    def _of_record(
        cls, headers: Headers | None, key: Any, value: Any, timestamp_ms: int, source: str, place: str
    ) -> Self:
        committed_at = datetime.fromtimestamp(timestamp_ms / 1000, UTC)
        try:
            return cls.from_headers(headers or (), key=key, value=value, committed_at=committed_at, source=source)
        except NoMessageId as error:
            raise NoMessageId(f"message {place}: {error}") from None


def _text(content: str | bytes | None) -> str | None:
    return content.decode(errors="replace") if isinstance(content, bytes) else content
