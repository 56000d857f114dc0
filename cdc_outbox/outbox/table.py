"""The outbox's table: from events to the statement that writes them, with all checks before it. Pure.

What the relay could never publish is refused here, before anything is written: the transaction is then as it was.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Final
from uuid import UUID

from cdc_outbox.outbox.event import Event
from cdc_outbox.outbox.payload import PayloadType, UnfitPayload, size_bytes, stored_payload, to_json
from cdc_outbox.transactions import Statement, quoted, quoted_table

_FIELDS: Final = ("id", "aggregate_type", "aggregate_id", "event_type", "headers", "payload")
_OPTIONAL: Final = ("aggregate_type", "headers")
_TOPIC_PART: Final = re.compile(r"[A-Za-z0-9._-]+")
_LONGEST_TOPIC: Final = 249
#: What the relay adds itself, in any style. A second one would be taken for the first.
_RESERVED_HEADERS: Final = re.compile(r"|id|type|sequence|content-type|ce_.*|cdc-outbox-.*", re.IGNORECASE | re.DOTALL)
#: Of a statement with many rows, in characters of JSON.
_CHARACTERS_AT_A_TIME: Final = 4_000_000


class EventRefused(ValueError):
    """The relay could never publish this event. Nothing was written. The payload is not in the message."""

    def __init__(self, event: Event, what: str, hint: str) -> None:
        # anything may have slipped into these, a payload too
        event_id = event.id if isinstance(event.id, UUID) else "without an id"
        event_type = f"of type {event.event_type[:100]!r}" if isinstance(event.event_type, str) else "without a type"
        super().__init__(f"event {event_id} {event_type}: {what}; {hint}")


@dataclass(frozen=True, slots=True)
class Checked:
    """Events that passed all checks."""

    ids: list[UUID]
    #: the parameter of one statement each, usually one
    texts: list[str]


class OutboxTable:
    """Which table, which columns, and what an event must be like. Every driver's ``Outbox`` is one.

    ``table`` is named as in SQL. ``columns`` maps a field of Event to its column, or to None where the table has none
    (``aggregate_type`` and ``headers`` only). ``payload_type`` is the payload column's. ``topic`` is the relay's
    kafka.topic. ``serialize`` makes text or bytes of a payload that is neither. Each of ``validate`` may raise what it
    likes. ``max_bytes`` bounds key, type, headers and payload together: brokers take 1,048,588 unless told otherwise.
    ``trace`` adds the current OpenTelemetry context to the headers, where that library is loaded.

    Raises ValueError for a table or column that cannot be one.
    """

    def __init__(  # noqa: PLR0913 - each is an option of its own
        self,
        table: str = "public.outbox",
        *,
        columns: Mapping[str, str | None] | None = None,
        payload_type: PayloadType = "json",
        topic: str = "outbox.{aggregate_type}",
        serialize: Callable[[Any], str | bytes] = to_json,
        validate: Sequence[Callable[[Event], None]] = (),
        max_bytes: int = 900_000,
        trace: bool = True,
    ) -> None:
        self._columns = _complete(columns or {})
        self._payload_type = payload_type
        self._topic_parts = list(Formatter().parse(topic))
        self._serialize = serialize
        self._validate = tuple(validate)
        self._max_bytes = max_bytes
        self._trace = trace and self._columns["headers"] is not None
        self.name: Final = quoted_table(table)
        self._insert: Final = _insert(self.name, self._columns, payload_type)

    def _check(self, events: Iterable[Event]) -> Checked:
        """Raises EventRefused, and whatever a validation hook raises."""
        ids: list[UUID] = []
        encoded: list[str] = []
        for event in events:
            encoded.append(self._encode(event))
            ids.append(event.id)
        return Checked(ids, [f"[{','.join(some)}]" for some in _chunks(encoded)])

    def _encode(self, event: Event) -> str:
        """The row in JSON: an object of columns, and the payload as text."""
        _check_fields(event)
        _check_headers(event)
        self._check_topic(event)
        for validate in self._validate:
            validate(event)
        if event.headers and self._columns["headers"] is None:
            raise EventRefused(
                event, "it has headers, and the table has no column for them", "add one, or leave them out"
            )
        headers = {**_trace_context(event), **event.headers} if self._trace else dict(event.headers)
        payload = self._payload(event, (event.aggregate_id, event.event_type, *headers, *headers.values()))
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

    def _payload(self, event: Event, rest: Iterable[str]) -> str | bytes | None:
        """As it will be stored. ``rest``: what travels beside it."""
        try:
            stored = stored_payload(event.payload, self._payload_type, self._serialize)
            size = size_bytes(stored, self._payload_type) + sum(len(text.encode()) for text in rest)
        except UnfitPayload as error:
            raise EventRefused(
                event,
                f"the payload does not fit a column of type {self._payload_type}: {error}",
                "give what json.dumps takes, JSON as text or bytes, or serialize= for what you have",
            ) from None
        if size > self._max_bytes:
            raise EventRefused(
                event,
                f"key, type, headers and payload are {size:,} bytes, more than max_bytes = {self._max_bytes:,}",
                "keep what is large elsewhere and send where it is, or raise max_bytes and the broker's limit with it",
            )
        return stored

    def _check_topic(self, event: Event) -> None:
        topic = ""
        for literal, name, _, _ in self._topic_parts:
            topic += literal
            if name:
                value = str(getattr(event, name)) if name in _FIELDS else "x"  # a column of the table's own
                if not _TOPIC_PART.fullmatch(value):
                    raise EventRefused(
                        event,
                        f"{name} {value[:100]!r} cannot be part of a topic's name",
                        "use letters, digits, dots, underscores and hyphens",
                    )
                topic += value
        if len(topic) > _LONGEST_TOPIC or topic in (".", ".."):
            raise EventRefused(
                event, f"topic {topic[:100]!r} is no name that Kafka takes", f"at most {_LONGEST_TOPIC} characters"
            )

    def read_emitted(self) -> Statement:
        """For tests: what is there, as text: id, type, aggregate's id and type, payload, headers."""
        fields = ("id", "event_type", "aggregate_id", "aggregate_type", "payload", "headers")
        columns = [quoted(column) if (column := self._columns[field]) else "NULL" for field in fields]
        if self._payload_type == "bytea":
            columns[fields.index("payload")] = f"encode({quoted(self._columns['payload'] or '')}, 'hex')"
        selected = ", ".join(f"CAST({column} AS text)" for column in columns)
        return Statement(f"SELECT {selected} FROM {self.name} ORDER BY 1", returns=True)

    def parse_payload(self, stored: str) -> Any:
        """For tests: a payload of ``read_emitted`` as Kafka gets it, or parsed if it is JSON."""
        if self._payload_type == "bytea":
            return bytes.fromhex(stored)
        return stored if self._payload_type == "text" else json.loads(stored)


def _check_fields(event: Event) -> None:
    if not isinstance(event.id, UUID):
        raise EventRefused(event, "id is not a UUID", "leave it out: it is then made")
    for name in ("event_type", "aggregate_id", "aggregate_type"):
        value = getattr(event, name)
        if not isinstance(value, str):
            hint = "flush first, so that the database gives it" if value is None else f"str({name})"
            raise EventRefused(event, f"{name} is {type(value).__name__}, not str", hint)
        if not value:
            raise EventRefused(event, f"{name} is empty", "it says what the event is about")
        _check_text(event, name, value)
    if event.aggregate_id == "None":
        raise EventRefused(
            event, "aggregate_id is 'None', the text of no id", "flush first, so that the database gives it"
        )


def _check_headers(event: Event) -> None:
    if not isinstance(event.headers, Mapping):
        raise EventRefused(event, f"headers must be a mapping, not {type(event.headers).__name__}", "names to values")
    for name, value in event.headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            shown = repr(name[:100]) if isinstance(name, str) else f"with a name of type {type(name).__name__}"
            raise EventRefused(event, f"header {shown} is {type(value).__name__}, not str", "headers are text")
        _check_text(event, "a header's name", name)
        _check_text(event, f"header {name[:100]!r}", value)
        if _RESERVED_HEADERS.fullmatch(name):
            raise EventRefused(event, f"header {name[:100]!r} is the relay's own", "give it another name")


def _check_text(event: Event, name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise EventRefused(event, f"{name} is no text", "it has half a surrogate pair in it") from None
    if "\0" in value:
        raise EventRefused(event, f"{name} has a NUL in it", "PostgreSQL keeps none")


def _trace_context(event: Event) -> dict[str, str]:
    """Of the span that is current; nothing where OpenTelemetry was not imported, or the event brings its own."""
    carrier: dict[str, str] = {}
    if "opentelemetry.trace" in sys.modules and "traceparent" not in event.headers:
        from opentelemetry import propagate

        propagate.inject(carrier)
    return carrier


def _complete(columns: Mapping[str, str | None]) -> dict[str, str | None]:
    """Every field's column. Raises ValueError."""
    for field, column in columns.items():
        if field not in _FIELDS:
            raise ValueError(f"columns: {field!r} is no field of an event; there are {', '.join(_FIELDS)}")
        if not column and (column is not None or field not in _OPTIONAL):
            raise ValueError(f"columns: {field} needs a column; only {' and '.join(_OPTIONAL)} may be None")
    complete = {field: columns.get(field, field) for field in _FIELDS}
    named = [column for column in complete.values() if column]
    if twice := next((column for column in named if named.count(column) > 1), None):
        raise ValueError(f"columns: two fields have column {twice!r}")
    return complete


def _insert(table: str, columns: Mapping[str, str | None], payload_type: PayloadType) -> Statement:
    """Rows from a JSON list of [object of columns, payload as text]. Columns that are not named get their defaults."""
    *names, payload = [quoted(column) for column in columns.values() if column]
    return Statement(
        f"INSERT INTO {table} ({', '.join(names)}, {payload})"
        f" SELECT {', '.join(f'event_row.{name}' for name in names)}, CAST(event.entry ->> 1 AS {payload_type})"
        " FROM json_array_elements(CAST(CAST(",
        " AS text) AS json)) AS event (entry),"
        f" json_populate_record(CAST(NULL AS {table}), event.entry -> 0) AS event_row",
    )


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
