"""The router: from a row of the outbox to a Kafka record.

When the stream introduces a relation the router compiles a *row plan* for it: which columns become topic, key, value
and headers. From then on an Insert is one call of that plan.

Pure: an event of a topic that is not known to be there waits for the answer (UnknownTopic).
"""

from binascii import unhexlify
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cdc_outbox.errors import MalformedStream, OperatorNeeded, PoisonEvent
from cdc_outbox.relay.headers import HEADER_CODE, Headers, HeaderStyle, cloudevents_maker, own_headers
from cdc_outbox.relay.topic_template import TopicTemplate
from cdc_outbox.wal.encodings import UTF8, Encoding
from cdc_outbox.wal.frames import MESSAGE_START
from cdc_outbox.wal.pgoutput import Relation
from cdc_outbox.wal.row_plan import RowPlan, compile_insert_reader

if TYPE_CHECKING:
    from cdc_outbox.relay.policy.gate import Gates, Ruling

#: What the relay needs of a row; `headers` and whatever else the topic template names come on top.
REQUIRED_FIELDS: Final = ("id", "aggregate_id", "event_type", "payload")

_BYTEA: Final = 17
#: Names of topics that are remembered before it is known that they are there.
_MAX_NAMES: Final = 10_000
#: Payload types by OID (pg_type.dat, fixed for ever), with the media type that CloudEvents wants to know.
_MEDIA_TYPES: Final = {
    114: b"application/json",  # json
    3802: b"application/json",  # jsonb
    25: b"text/plain; charset=utf-8",  # text
    1043: b"text/plain; charset=utf-8",  # varchar
    _BYTEA: b"application/octet-stream",
}


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

    @property
    def record(self) -> Record:
        """As Kafka would have got it, or the nearest to that."""
        return Record(self.topic or "", self.payload, self.key or b"", self.headers)


class Ruled(Exception):
    """The policy does not let an event pass. Caught by the pipeline."""

    def __init__(self, ruling: "Ruling", event: EventDescription) -> None:
        super().__init__(ruling.rule)
        self.ruling = ruling
        self.event = event


def _ruled(
    ruling: "Ruling", ids: tuple[bytes | None, bytes | None, bytes | None], topic: str, value: Any, *more: Any
) -> Ruled:
    """``ids``: event id, aggregate type, event type; ``more``: key and headers."""
    event_id, aggregate_type, event_type = map(as_text, ids)
    key, headers = more
    return Ruled(
        ruling, EventDescription(event_id, aggregate_type, as_text(key), key, event_type, topic, headers, value)
    )


class UnknownTopic(Exception):
    """Nobody has looked yet whether ``topic`` is there. Caught by the pipeline."""

    def __init__(self, topic: str) -> None:
        super().__init__(topic)
        self.topic = topic


class _Topics(dict[tuple[bytes | None, ...], str]):
    """Topics seen so far, by the column values that named them: after the first row of a topic, one look-up."""

    def __init__(self, template: TopicTemplate, known: Container[str]) -> None:
        super().__init__()
        self._template = template
        self._known = known

    def __missing__(self, values: tuple[bytes | None, ...]) -> str:
        topic = self._template.render(values)
        if topic not in self._known:
            raise UnknownTopic(topic)
        self[values] = topic
        return topic


class _Names(dict[tuple[bytes | None, ...], str]):
    """Topics' names, whether or not there can be such topics: what is judged need not go to one."""

    def __init__(self, template: TopicTemplate) -> None:
        super().__init__()
        self._template = template

    def __missing__(self, values: tuple[bytes | None, ...]) -> str:
        if len(self) >= _MAX_NAMES:
            self.clear()
        name = self[values] = self._template.fill_in(values) or ""
        return name


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
    #: topics that are there; whoever finds another one adds it
    known_topics: set[str]
    encoding: Encoding = UTF8


class Router:
    """Compiles row plans. ``source`` is the CloudEvents source; plans raise UnknownTopic unless the topic is known.

    Events that are ``expendable`` nobody would miss: one that cannot be published is no reason to stop.
    """

    def __init__(
        self,
        outbox: Outbox,
        topic: TopicTemplate,
        style: HeaderStyle,
        source: str,
        known_topics: Container[str],
        encoding: Encoding = UTF8,
        *,
        expendable: bool = False,
    ) -> None:
        self.expendable = expendable
        self._outbox = outbox
        self._topic = topic
        self._style = style
        self._source = source.encode()
        self._known_topics = known_topics
        self._topics = _Topics(topic, known_topics)
        self._names = _Names(topic)
        self._encoding = encoding

    def compile(self, relation: Relation, gates: "Gates | None" = None) -> RowPlan | None:
        """The row plan for ``relation``: a Record's four fields of an Insert frame and its commit time in Unix ms.

        None if its rows are no events (a publication may hold other tables). With ``gates`` the plan raises Ruled for
        an event that the policy does not allow, whether or not its topic is there; expendable ones are not judged.

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
        body = ["if {aggregate_id} is None: raise key_is_null()", f"headers = {HEADER_CODE[self._style]}"]
        judged = gates is not None and not self.expendable
        if judged and outbox.column("aggregate_type", types):
            fields["aggregate_type"] = "aggregate_type"
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
        if judged:
            judged_type = "{aggregate_type}" if "aggregate_type" in fields else "None"
            body.append(f"value = {value}")
            value = "value"
            body += [
                f"gate = gates[{judged_type}, {{event_type}}]",
                "if gate is not None:",
                f" topic = names[({topic_values})]",
                " ruling = gate({id}, topic, value, {aggregate_id}, headers, commit_time_ms, 'outbox')",
                " if not ruling.is_allowed:",
                f"  ids = {{id}}, {judged_type}, {{event_type}}",
                "  raise ruled(ruling, ids, topic, value, {aggregate_id}, headers)",
            ]
        body.append(f"return topics[({topic_values})], {value}, {{aggregate_id}}, headers")
        # One generated function an event: with calls of reader and header maker it was 1.33 instead of 1.09 µs.
        return RowPlan(
            relation,
            columns,
            body,
            {
                "topics": self._topics,
                "names": self._names,
                "gates": gates,
                "ruled": _ruled,
                "to_utf8": self._encoding.to_utf8,
                "key_is_null": _key_is_null,
                "own_headers": own_headers,
                "unhex": _unhex,
                "cloudevents": cloudevents_maker(self._source, _MEDIA_TYPES[payload_type]),
            },
        )

    def _column(self, field: str, types: Mapping[str, int]) -> str:
        """Of a relation that has all of them."""
        column = self._outbox.column(field, types)
        assert column is not None
        return column

    def check(self, topic: str) -> None:
        """Raises PoisonEvent if ``topic`` must not be written to, UnknownTopic."""
        self._topic.check(topic)
        if topic not in self._known_topics:
            raise UnknownTopic(topic)

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
            [f"return {HEADER_CODE[self._style]}"],
            {"cloudevents": cloudevents_maker(self._source, _MEDIA_TYPES[types[payload_column]])},
        ).read
        headers: Headers = [
            (name, self._encoding.text(content or b"").encode())
            for name, content in make_headers(frame, commit_time_ms)
        ]
        if text := value("headers"):
            try:
                headers += own_headers(text)
            except PoisonEvent:
                headers.append(("headers", text))  # kept as they are, for whoever corrects them
        return EventDescription(
            event_id=as_text(value("id")),
            aggregate_type=as_text(value("aggregate_type")),
            aggregate_id=as_text(value("aggregate_id")),
            key=self._key(row[self._column("aggregate_id", types)]),
            event_type=as_text(value("event_type")),
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


def as_text(value: bytes | None) -> str | None:
    return None if value is None else str(value, "utf-8", "replace")


def _unhex(text: bytes) -> bytes:
    """Bytes of a bytea in its hex format: backslash, x, two digits a byte."""
    try:
        if text[:2] == b"\\x":
            return unhexlify(text[2:])
    except ValueError:
        pass
    raise MalformedStream("a bytea payload is not in hex format")
