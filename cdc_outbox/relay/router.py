"""The router: from a row of the outbox to a Kafka record.

When the stream introduces a relation the router compiles a *row plan* for it: which columns become topic, key, value
and headers. From then on an Insert is one call of that plan.

Pure: whether a topic exists is asked through a function the router is given.
"""

import re
from binascii import unhexlify
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from datetime import UTC, datetime
from json import JSONDecoder
from string import Formatter
from typing import Any, Final, Literal, NamedTuple

import orjson

from cdc_outbox.errors import ConfigurationError, MalformedStream, OperatorNeeded, PoisonEvent
from cdc_outbox.postgres.encodings import UTF8, Encoding
from cdc_outbox.postgres.frames import MESSAGE_START
from cdc_outbox.postgres.pgoutput import Relation, RowPlan, compile_insert_reader

HeaderStyle = Literal["plain", "cloudevents", "debezium"]
Headers = list[tuple[str, bytes | None]]

#: What the relay needs of a row; `headers` and whatever else the topic template names come on top.
REQUIRED_FIELDS: Final = ("id", "aggregate_id", "event_type", "payload")

_BYTEA: Final = 17
#: Payload types by OID (pg_type.dat, fixed for ever), with the media type that CloudEvents wants to know.
_MEDIA_TYPES: Final = {
    114: b"application/json",  # json
    3802: b"application/json",  # jsonb
    25: b"text/plain; charset=utf-8",  # text
    1043: b"text/plain; charset=utf-8",  # varchar
    _BYTEA: b"application/octet-stream",
}

#: What a row plan does for the headers of each style; cloudevents has too many for a line.
_HEADER_CODE: Final[Mapping[HeaderStyle, str]] = {
    "plain": '[("id", {id}), ("type", {event_type})]',
    "debezium": '[("id", {id})]',
    "cloudevents": "cloudevents({id}, {event_type}, {aggregate_id}, commit_time_ms)",
}

_LONGEST_TOPIC: Final = 249
#: What Kafka takes as a topic's name at all (org.apache.kafka.common.internals.Topic), but for "." and "..".
_LEGAL_TOPIC: Final = re.compile(r"[A-Za-z0-9._-]{1,249}")


_UNREADABLE: Final = "headers_unreadable"
#: Without one there is no escape in a JSON text, and so no NUL: the cheapest look there is.
_BACKSLASH: Final = ord("\\")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


#: Numbers are kept as text: one of 5,000 digits is JSON, too.
_DECODER: Final = JSONDecoder(parse_int=str, parse_float=str, parse_constant=_refuse_constant)
_MEMBER_NAME: Final = re.compile(r'[\s,]*("(?:[^"\\]|\\.)*")\s*:\s*')


class Record(NamedTuple):
    topic: str
    value: bytes | None
    key: bytes
    headers: Headers


@dataclass(frozen=True, slots=True)
class EventDescription:
    """Of an event that could not be published, what is known; None where the row has nothing."""

    event_id: str | None = None
    aggregate_type: str | None = None
    aggregate_id: str | None = None
    #: of the record; None too if it is no text
    key: bytes | None = None
    event_type: str | None = None
    #: as the data would have it, whether or not it may be written to
    topic: str | None = None
    headers: Headers = dataclass_field(default_factory=list)
    payload: bytes | None = None


_MakeHeaders = Callable[[bytes, bytes, bytes, int], Headers]


class TopicTemplate:
    """``outbox.{aggregate_type}``: literal text and column names in braces.

    ``pattern`` is what every resulting topic must match as a whole. The default allows any legal characters where the
    template has a placeholder, so that data chooses only what the template lets it choose.
    Raises ConfigurationError for a template or pattern that cannot be read.
    """

    def __init__(self, template: str, pattern: str | None = None) -> None:
        try:
            parts = list(Formatter().parse(template))
        except ValueError as error:
            raise ConfigurationError(f"kafka.topic = {template!r}: {error}") from error
        if not template or any(name == "" or spec or conversion for _, name, spec, conversion in parts):
            raise ConfigurationError(
                f"kafka.topic = {template!r} is not a template",
                hint="write column names in braces, e.g. outbox.{aggregate_type}",
            )
        if not _is_legal("".join(literal + ("x" if name else "") for literal, name, _, _ in parts)):
            raise ConfigurationError(
                f"kafka.topic = {template!r} makes no topic that Kafka would take",
                hint=f"use letters, digits, dots, underscores and hyphens, at most {_LONGEST_TOPIC}",
            )
        self.text = template
        self.fields = tuple(name for _, name, _, _ in parts if name)
        self._format = "".join(_escape(literal) + ("{}" if name else "") for literal, name, _, _ in parts)
        derived = "".join(re.escape(literal) + ("[A-Za-z0-9._-]+" if name else "") for literal, name, _, _ in parts)
        try:
            self._pattern = re.compile(pattern or derived)
        except re.error as error:
            raise ConfigurationError(f"kafka.topic_pattern = {pattern!r}: {error}") from error

    def render(self, values: tuple[bytes | None, ...]) -> str:
        """The topic for the values of ``fields``. Raises PoisonEvent if data would name a topic it must not."""
        topic = self.fill_in(values)
        if topic is None:
            raise PoisonEvent(
                f"column {self.fields[values.index(None)]} is NULL, but kafka.topic is {self.text!r}",
                reason="topic_unknown",
            )
        self.check(topic)
        return topic

    def allows(self, topic: str) -> bool:
        """Whether data may name it."""
        return _is_legal(topic) and self._pattern.fullmatch(topic) is not None

    def check(self, topic: str) -> None:
        """Raises PoisonEvent unless ``topic`` is one that data may name."""
        if not self.allows(topic):
            shown = repr(topic[:_LONGEST_TOPIC])
            why = f"does not match {self._pattern.pattern!r}" if _is_legal(topic) else "is no name that Kafka takes"
            raise PoisonEvent(
                f"topic {shown} {why}",
                reason="topic_not_allowed",
                hint="correct what writes the row, or widen kafka.topic_pattern",
            )

    def fill_in(self, values: tuple[bytes | None, ...]) -> str | None:
        """The topic as the data would have it, allowed or not; None if a value is missing."""
        if None in values:
            return None
        return self._format.format(*(value.decode(errors="replace") for value in values if value is not None))


def _is_legal(topic: str) -> bool:
    return _LEGAL_TOPIC.fullmatch(topic) is not None and topic not in (".", "..")


def _escape(literal: str) -> str:
    return literal.replace("{", "{{").replace("}", "}}")


class _Topics(dict[tuple[bytes | None, ...], str]):
    """Topics seen so far, by the column values that named them: after the first row of a topic, one look-up."""

    def __init__(self, template: TopicTemplate, require_topic: Callable[[str], None]) -> None:
        super().__init__()
        self._template = template
        self._require_topic = require_topic

    def __missing__(self, values: tuple[bytes | None, ...]) -> str:
        topic = self._template.render(values)
        self._require_topic(topic)
        self[values] = topic
        return topic


@dataclass(frozen=True, slots=True)
class Outbox:
    """Where the events are: the table's qualified name, its OIDs, and which of its columns holds which field.

    ``columns`` maps a field to columns, of which the first that is there counts: the log may hold rows from before a
    column was renamed. A field it lacks is looked for under its own name. ``oids`` are the table's and its partitions':
    rows come with the name that the table had when they were written, the OID stays.
    """

    namespace: str
    name: str
    columns: Mapping[str, tuple[str, ...]]
    oids: frozenset[int] = frozenset()

    def column(self, field: str, among: Container[str]) -> str | None:
        return next((column for column in self.candidates(field) if column in among), None)

    def candidates(self, field: str) -> tuple[str, ...]:
        return self.columns.get(field, (field,))

    def __str__(self) -> str:
        return f"{self.namespace}.{self.name}"


class Strays:
    """Inserts that nobody routes, and must not pass unseen: into a table that the publication lists one by one.

    ``listed``: None if it lists no other tables than one by one, then each that comes is; else the OIDs of those.
    ``ignored``: qualified names of tables that hold no events.
    """

    def __init__(self, listed: frozenset[int] | None = frozenset(), ignored: Container[str] = ()) -> None:
        self._listed = listed
        self._ignored = ignored

    def refusal(self, relation: Relation) -> OperatorNeeded | None:
        """What an Insert into ``relation`` is to be answered with; None if it may pass."""
        if relation.namespace == "cdc_outbox" or str(relation) in self._ignored:
            return None
        if self._listed is not None and relation.id not in self._listed:
            return None
        return OperatorNeeded(
            f"a row of table {relation} has come, which is in the publication and not outbox.table",
            hint=f"if it holds no events: outbox.ignore_tables = ['{relation.as_in_sql}']; if it does, it wants a "
            "relay, a publication and a slot of its own",
        )


@dataclass(frozen=True, slots=True)
class Routing:
    """A router for each outbox, the application's own first, and what of all else may pass."""

    routers: Sequence["Router"]
    strays: Strays
    encoding: Encoding = UTF8


class Router:
    """Compiles row plans. ``source`` is the CloudEvents source; ``require_topic`` raises if a topic is not there.

    Events that are ``expendable`` nobody would miss: one that cannot be published is no reason to stop.
    """

    def __init__(
        self,
        outbox: Outbox,
        topic: TopicTemplate,
        style: HeaderStyle,
        source: str,
        require_topic: Callable[[str], None],
        encoding: Encoding = UTF8,
        *,
        expendable: bool = False,
    ) -> None:
        self.expendable = expendable
        self._outbox = outbox
        self._topic = topic
        self._style = style
        self._source = source.encode()
        self._require_topic = require_topic
        self._topics = _Topics(topic, require_topic)
        self._encoding = encoding

    def compile(self, relation: Relation) -> RowPlan | None:
        """The row plan for ``relation``: a Record's four fields of an Insert frame and its commit time in Unix ms.

        None if its rows are no events (a publication may hold other tables).

        Raises OperatorNeeded naming the column that the outbox lacks or whose type cannot be a payload.
        """
        outbox = self._outbox
        if relation.id not in outbox.oids and (relation.namespace, relation.name) != (outbox.namespace, outbox.name):
            return None
        types = {column.name: column.type_oid for column in relation.columns}
        if field := missing_field(outbox, self._topic, types):
            names = outbox.candidates(field)
            raise OperatorNeeded(
                f"rows of {relation} come without column {names[-1]!r}, wanted for {field}; they have "
                f"{', '.join(types)}",
                hint="rows that were written before a change keep their columns; name one that they have besides: "
                f"outbox.columns.{field} = {[*names, '...']}",
            )
        payload_type = types[self._column("payload", types)]
        check_payload_type(outbox, self._column("payload", types), payload_type)
        topic_fields = {f"topic{number}": field for number, field in enumerate(self._topic.fields)}
        fields = {**{field: field for field in REQUIRED_FIELDS}, **topic_fields}
        body = ["if {aggregate_id} is None: raise key_is_null()", f"headers = {_HEADER_CODE[self._style]}"]
        if outbox.column("headers", types):
            fields["headers"] = "headers"
            body.append("if {headers} is not None: headers += own_headers({headers})")
        value = "{payload}"
        if payload_type == _BYTEA:
            value = "None if {payload} is None else unhex({payload})"
        columns = {variable: self._column(field, types) for variable, field in fields.items()}
        if self._encoding.codec:
            once_each = {column: variable for variable, column in columns.items()}.values()
            body = [*(f"{{{variable}}} = to_utf8({{{variable}}})" for variable in once_each), *body]
        topic_values = "".join(f"{{{variable}}}, " for variable in topic_fields)
        body.append(f"return topics[({topic_values})], {value}, {{aggregate_id}}, headers")
        # One generated function an event: with calls of reader and header maker it was 1.33 instead of 1.09 µs.
        return RowPlan(
            relation,
            columns,
            body,
            {
                "topics": self._topics,
                "to_utf8": self._encoding.to_utf8,
                "key_is_null": _key_is_null,
                "own_headers": _own_headers,
                "unhex": _unhex,
                "cloudevents": _cloudevents_maker(self._source, _MEDIA_TYPES[payload_type]),
            },
        )

    def _column(self, field: str, types: Mapping[str, int]) -> str:
        """Of a relation that has all of them."""
        column = self._outbox.column(field, types)
        assert column is not None
        return column

    def check(self, topic: str) -> None:
        """Raises PoisonEvent unless ``topic`` is one that may be written to, whatever ``require_topic`` raises."""
        self._topic.check(topic)
        self._require_topic(topic)

    def describe(self, relation: Relation, frame: bytes, commit_time_ms: int) -> EventDescription:
        """What can be told of an event that has no Record. Off the hot path, and content with any row.

        Of a row that cannot be decoded the payload is the whole Insert message, as the server sent it.
        """
        try:
            names = [column.name for column in relation.columns]
            row = dict(zip(names, compile_insert_reader(relation, names)(frame), strict=True))
            return self._describe_row(row, relation, frame, commit_time_ms)
        except MalformedStream:
            return EventDescription(payload=frame[MESSAGE_START:])

    def _describe_row(
        self, row: Mapping[str, bytes | None], relation: Relation, frame: bytes, commit_time_ms: int
    ) -> EventDescription:
        types = {column.name: column.type_oid for column in relation.columns}
        payload_column = self._column("payload", types)
        payload = self._payload(row[payload_column], types[payload_column])

        def value(field: str) -> bytes | None:
            stored = row.get(self._outbox.column(field, types) or field)
            return None if stored is None else self._encoding.text(stored).encode()

        # the very line that row plans run, but for NULL, which is an empty header here
        make_headers = RowPlan(
            relation,
            {field: self._column(field, types) for field in ("id", "event_type", "aggregate_id")},
            [f"return {_HEADER_CODE[self._style]}"],
            {"cloudevents": _cloudevents_maker(self._source, _MEDIA_TYPES[types[payload_column]])},
        ).read
        headers: Headers = [
            (name, self._encoding.text(content or b"").encode())
            for name, content in make_headers(frame, commit_time_ms)
        ]
        if text := value("headers"):
            try:
                headers += _own_headers(text)
            except PoisonEvent:
                headers.append(("headers", text))  # kept as they are, for whoever mends them
        return EventDescription(
            event_id=_text(value("id")),
            aggregate_type=_text(value("aggregate_type")),
            aggregate_id=_text(value("aggregate_id")),
            key=self._key(row[self._column("aggregate_id", types)]),
            event_type=_text(value("event_type")),
            topic=self._topic.fill_in(tuple(map(value, self._topic.fields))),
            headers=headers,
            payload=payload,
        )

    def _key(self, stored: bytes | None) -> bytes | None:
        try:
            return self._encoding.to_utf8(stored)
        except MalformedStream:
            return None

    def _payload(self, stored: bytes | None, type_oid: int) -> bytes | None:
        """As Kafka would have got it; what is no text, as it is stored."""
        if type_oid == _BYTEA and stored is not None:
            return _unhex(stored)
        try:
            return self._encoding.to_utf8(stored)
        except MalformedStream:
            return stored


def missing_field(outbox: Outbox, topic: TopicTemplate, columns: Container[str]) -> str | None:
    """The first field that ``outbox`` or ``topic`` wants and that none of ``columns`` holds."""
    wanted = [*REQUIRED_FIELDS, *topic.fields, *(["headers"] if "headers" in outbox.columns else [])]
    return next((field for field in wanted if outbox.column(field, columns) is None), None)


def check_payload_type(outbox: Outbox, column: str, type_oid: int) -> None:
    """Raises OperatorNeeded."""
    if type_oid not in _MEDIA_TYPES:
        raise OperatorNeeded(
            f"column {column!r} of {outbox} cannot be a payload: its type is neither json, jsonb, text nor bytea",
            hint="change the column's type, or name another with outbox.columns.payload",
        )


def _key_is_null() -> PoisonEvent:
    return PoisonEvent("the aggregate id is NULL", reason="aggregate_id_null")


def _cloudevents_maker(source: bytes, media_type: bytes) -> _MakeHeaders:
    def cloudevents(event_id: bytes, event_type: bytes, key: bytes, commit_time_ms: int) -> Headers:
        # Source: "Kafka Protocol Binding for CloudEvents 1.0", 3.2 binary content mode
        return [
            ("ce_specversion", b"1.0"),
            ("ce_id", event_id),
            ("ce_source", source),
            ("ce_type", event_type),
            ("ce_subject", key),
            ("ce_time", datetime.fromtimestamp(commit_time_ms / 1000, UTC).isoformat(timespec="milliseconds").encode()),
            ("content-type", media_type),
        ]

    return cloudevents


def _own_headers(text: bytes) -> Headers:
    """The row's own headers: a JSON object of strings. Other JSON values travel as their JSON text, null as null."""
    try:
        own = orjson.loads(text)
    except orjson.JSONDecodeError:
        own = _members_as_written(text)  # numbers beyond a float's are JSON too
    if own is None:  # JSON's null, as some mappers write NULL
        return []
    if not isinstance(own, dict):
        raise PoisonEvent("the headers are not a JSON object", reason=_UNREADABLE)
    if _BACKSLASH in text and any("\0" in name for name in own):
        raise PoisonEvent("a header's name has a NUL in it, where Kafka's clients would cut it", reason=_UNREADABLE)
    try:
        return [(name, value.encode() if value is not None else None) for name, value in own.items()]
    except AttributeError:  # neither a string nor null
        own = _members_as_written(text)
        return [(name, None if value is None else value.encode()) for name, value in own.items()]


def _members_as_written(text: bytes) -> Any:
    """What is in a JSON object; values that are neither strings nor null as they are written: 1.10, and not 1.1."""
    try:
        written = text.decode()
        value = _DECODER.decode(written)
        if not isinstance(value, dict):
            return value
        members: dict[str, str | None] = {}
        at = written.index("{") + 1
        while name := _MEMBER_NAME.match(written, at):
            value, at = _DECODER.raw_decode(written, name.end())
            as_written = value is not None and not isinstance(value, str)
            members[_DECODER.decode(name[1])] = written[name.end() : at] if as_written else value
        for member in members.items():
            "".join(filter(None, member)).encode()  # half a surrogate pair is JSON, and no text
    except (ValueError, RecursionError) as error:
        raise PoisonEvent(f"the headers cannot be read: {error}", reason=_UNREADABLE) from error
    return members


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode(errors="replace")


def _unhex(text: bytes) -> bytes:
    """Bytes of a bytea in its hex format: backslash, x, two digits a byte."""
    try:
        if text[:2] == b"\\x":
            return unhexlify(text[2:])
    except ValueError:
        pass
    raise MalformedStream("a bytea payload is not in hex format")
