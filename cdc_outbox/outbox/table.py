"""The outbox's table: from events to the statement that writes them, with all checks before it. Pure.

What the relay could never publish is refused here, before anything is written: the transaction is then as it was.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal
from uuid import UUID

from cdc_outbox.outbox.event import Event, HasModelDumpJson, Payload
from cdc_outbox.transactions import Statement, quoted, quoted_table

PayloadType = Literal["json", "text", "bytea"]

_FIELDS: Final = ("id", "aggregate_type", "aggregate_id", "event_type", "headers", "payload")
#: The rest of the longest topic name that Kafka takes, after ``outbox.``.
_TOPIC_PART: Final = re.compile(r"[A-Za-z0-9._-]{1,242}")
#: What the relay adds itself, in any style. A second one would be taken for the first.
_RESERVED_HEADERS: Final = re.compile(r"id|type|ce_.*|cdc-outbox-.*", re.IGNORECASE | re.DOTALL)
#: Of a statement with many rows, in characters of JSON.
_CHARACTERS_AT_A_TIME: Final = 4_000_000


class EventRefused(ValueError):
    """The relay could never publish this event. Nothing was written. The payload is not in the message."""

    def __init__(self, event: Event, what: str, hint: str) -> None:
        event_type = event.event_type if isinstance(event.event_type, str) else type(event.event_type).__name__
        super().__init__(f"event {event.id} of type {event_type[:100]!r}: {what}; {hint}")


@dataclass(frozen=True, slots=True)
class Rows:
    """Events that passed all checks."""

    ids: list[UUID]
    #: the parameter of one statement each, usually one
    texts: list[str]


def to_json(payload: Payload) -> str:
    """As ``json.dumps`` does, without spaces, or as the object does. Raises TypeError, ValueError, RecursionError."""
    if isinstance(payload, HasModelDumpJson):
        return payload.model_dump_json()
    return json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class OutboxTable:
    """Which table, which columns, and what an event must be like. Every driver's ``Outbox`` is one.

    ``table`` is named as in SQL. ``columns`` maps a field of Event to its column; to None where the table has none
    (``aggregate_type`` and ``headers`` only). ``payload_type`` is the payload column's type; "json" is right for jsonb
    too. ``serialize`` makes text or bytes of a payload that is neither. Each of ``validate`` may raise what it likes.
    ``max_bytes`` bounds key, headers and payload together; the broker's default limit is 1,048,588. ``trace`` adds the
    current OpenTelemetry context to the headers, where that library is loaded.

    Raises ValueError for a table or column that cannot be one.
    """

    def __init__(
        self,
        table: str = "public.outbox",
        *,
        columns: Mapping[str, str | None] | None = None,
        payload_type: PayloadType = "json",
        serialize: Callable[[Any], str | bytes] = to_json,
        validate: Sequence[Callable[[Event], None]] = (),
        max_bytes: int = 900_000,
        trace: bool = True,
    ) -> None:
        self._columns = _complete(columns or {})
        self._payload_type = payload_type
        self._serialize = serialize
        self._validate = tuple(validate)
        self._max_bytes = max_bytes
        self._trace = trace
        self.name: Final = quoted_table(table)
        self.statement: Final = _insert(self.name, self._columns, payload_type)
        #: For tests: what is there, as text.
        self.read_emitted: Final = _select(self.name, self._columns)

    def rows(self, events: Iterable[Event]) -> Rows:
        """Raises EventRefused, and whatever a validation hook raises."""
        ids: list[UUID] = []
        encoded: list[str] = []
        for event in events:
            encoded.append(self._encode(event))
            ids.append(event.id)
        return Rows(ids, [f"[{','.join(some)}]" for some in _chunks(encoded)])

    def parse_payload(self, stored: str) -> Any:
        """For tests: the payload of a row that ``read_emitted`` returned, as Kafka gets it, or parsed if it is JSON."""
        match self._payload_type:
            case "json":
                return json.loads(stored)
            case "bytea":
                return bytes.fromhex(stored.removeprefix("\\x"))
            case "text":
                return stored

    def _encode(self, event: Event) -> str:
        """The row in JSON: an object of columns, and the payload as text."""
        _check_fields(event)
        _check_headers(event)
        headers = {**_trace_context(event), **event.headers} if self._trace else event.headers
        for validate in self._validate:
            validate(event)
        payload = self._payload(event)
        size_bytes = sum(len(text.encode()) for text in (event.aggregate_id, *headers, *headers.values()))
        size_bytes += len(payload.encode() if isinstance(payload, str) else payload or b"")
        if size_bytes > self._max_bytes:
            raise EventRefused(
                event,
                f"key, headers and payload are {size_bytes:,} bytes, more than max_bytes = {self._max_bytes:,}",
                "keep what is large elsewhere and send where it is, or raise max_bytes and the broker's limit with it",
            )
        if headers and self._columns["headers"] is None:
            raise EventRefused(event, "it has headers, and the table has no column for them", "add one, or trace=False")
        fields = {
            "id": str(event.id),
            "aggregate_type": event.aggregate_type,
            "aggregate_id": event.aggregate_id,
            "event_type": event.event_type,
            "headers": headers or None,
        }
        row = {column: fields[field] for field, column in self._columns.items() if field in fields and column}
        text = f"\\x{payload.hex()}" if isinstance(payload, bytes) else payload
        return json.dumps([row, text], ensure_ascii=False)

    def _payload(self, event: Event) -> str | bytes | None:
        """Bytes for a bytea, else text."""
        payload = event.payload
        if payload is None:
            return None
        try:
            if not isinstance(payload, str | bytes):
                payload = self._serialize(payload)
            if self._payload_type == "bytea":
                return payload.encode() if isinstance(payload, str) else payload
            text = payload if isinstance(payload, str) else payload.decode()
            text.encode()
            if self._payload_type == "json":
                _check_json(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise EventRefused(
                event,
                f"the payload cannot be {'JSON' if self._payload_type == 'json' else 'text'} ({_reason(error)})",
                "give what json.dumps takes, JSON as text or bytes, or serialize= for what you have",
            ) from None  # the exception itself holds the payload
        if "\0" in text:
            raise EventRefused(event, "the payload has a NUL in it", "PostgreSQL keeps those in a bytea only")
        return text


def _check_fields(event: Event) -> None:
    if not isinstance(event.id, UUID):
        raise EventRefused(event, "its id is no UUID", "leave it out: it is then made")
    for name in ("event_type", "aggregate_id", "aggregate_type"):
        value = getattr(event, name)
        if not isinstance(value, str):
            hint = "flush first, so that the database gives it" if value is None else f"str({name})"
            raise EventRefused(event, f"{name} is {type(value).__name__}, not str", hint)
        if not value:
            raise EventRefused(event, f"{name} is empty", "it says what the event is about")
        _check_text(event, name, value)
    if not _TOPIC_PART.fullmatch(event.aggregate_type) or event.aggregate_type in (".", ".."):
        raise EventRefused(
            event,
            f"aggregate_type {event.aggregate_type[:100]!r} cannot be part of a topic's name",
            "use letters, digits, dots, underscores and hyphens, at most 242",
        )


def _check_headers(event: Event) -> None:
    if not isinstance(event.headers, Mapping):
        raise EventRefused(event, f"its headers are {type(event.headers).__name__}, no mapping", "names to values")
    for name, value in event.headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise EventRefused(event, f"header {name!r} is {type(value).__name__}, not str", "headers are text")
        _check_text(event, "a header's name", name)
        _check_text(event, f"header {name[:100]!r}", value)
        if not name or _RESERVED_HEADERS.fullmatch(name):
            raise EventRefused(event, f"header {name[:100]!r} is the relay's own", "give it another name")


def _check_text(event: Event, name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise EventRefused(event, f"{name} is no text", "it has half a surrogate pair in it") from None
    if "\0" in value:
        raise EventRefused(event, f"{name} has a NUL in it", "PostgreSQL keeps none")


def _check_json(text: str) -> None:
    """Numbers as text: one of 5,000 digits is JSON, too. Raises ValueError, RecursionError."""
    json.loads(text, parse_int=str, parse_float=str, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _reason(error: Exception) -> str:
    """What was wrong, without a word of what it was wrong with."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos}"
    if isinstance(error, UnicodeEncodeError | UnicodeDecodeError):
        return f"no {error.encoding}: {error.reason}"
    return f"{type(error).__name__}: {error}"


def _trace_context(event: Event) -> dict[str, str]:
    """Of the span that is current; nothing where OpenTelemetry was not imported, or the event brings its own."""
    carrier: dict[str, str] = {}
    if "opentelemetry" in sys.modules and "traceparent" not in event.headers:
        from opentelemetry import propagate

        propagate.inject(carrier)
    return carrier


def _complete(columns: Mapping[str, str | None]) -> dict[str, str | None]:
    """Every field's column. Raises ValueError."""
    for field, column in columns.items():
        if field not in _FIELDS:
            raise ValueError(f"columns: {field!r} is no field of an event; there are {', '.join(_FIELDS)}")
        if column is None and field not in ("aggregate_type", "headers"):
            raise ValueError(f"columns: the table needs one for {field}")
    return {field: columns.get(field, field) for field in _FIELDS}


def _insert(table: str, columns: Mapping[str, str | None], payload_type: PayloadType) -> Statement:
    """Rows from a JSON list of [object of columns, payload as text]. Columns that are not named get their defaults."""
    *names, payload = [quoted(column) for column in columns.values() if column]
    before = (
        f"INSERT INTO {table} ({', '.join(names)}, {payload})"
        f" SELECT {', '.join(f'event.{name}' for name in names)}, CAST(given ->> 1 AS {payload_type})"
        " FROM json_array_elements(CAST(CAST("
    )
    return Statement(
        before, f" AS text) AS json)) AS given, json_populate_record(CAST(NULL AS {table}), given -> 0) AS event"
    )


def _select(table: str, columns: Mapping[str, str | None]) -> Statement:
    fields = ("id", "event_type", "aggregate_id", "aggregate_type", "payload", "headers")
    names = [quoted(column) if (column := columns[field]) else "NULL" for field in fields]
    selected = ", ".join(f"CAST({name} AS text)" for name in names)
    return Statement(f"SELECT {selected} FROM {table} ORDER BY 1", returns=True)


def _chunks(encoded: list[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for text in encoded:
        if chunk and characters + len(text) > _CHARACTERS_AT_A_TIME:
            yield chunk
            chunk, characters = [], 0
        chunk.append(text)
        characters += len(text)
    if chunk:
        yield chunk
