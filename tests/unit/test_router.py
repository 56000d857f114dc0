import re
from collections.abc import Mapping

import pytest

from cdc_outbox.errors import ConfigurationError, MalformedStream, OperatorNeeded, PoisonEvent
from cdc_outbox.relay.headers import HeaderStyle
from cdc_outbox.relay.router import Outbox, Record, Router, Strays, UnknownTopic
from cdc_outbox.relay.topic_template import TopicTemplate
from cdc_outbox.wal.encodings import Encoding
from cdc_outbox.wal.pgoutput import Column, Relation
from support import frames
from support.topics import ANY_TOPIC

JSON, JSONB, TEXT, BYTEA, UUID, TIMESTAMPTZ = 114, 3802, 25, 17, 2950, 1184
COLUMNS = {
    "id": UUID,
    "aggregate_type": TEXT,
    "aggregate_id": TEXT,
    "event_type": TEXT,
    "payload": JSON,
    "headers": JSON,
    "created_at": TIMESTAMPTZ,
}
ROW: dict[str, bytes | None] = {
    "id": b"e-1",
    "aggregate_type": b"order",
    "aggregate_id": b"o-1",
    "event_type": b"order.placed",
    "payload": b'{"a":  1}',
    "headers": None,
    "created_at": b"2024-01-01",
}
FIELDS = {name: (name,) for name in ("id", "aggregate_type", "aggregate_id", "event_type", "payload")}
#: 2024-05-06T07:08:09.123Z
COMMIT_TIME_MS = 1_714_979_289_123


def relation(columns: dict[str, int]) -> Relation:
    return Relation(7, "public", "outbox", tuple(Column(name, oid) for name, oid in columns.items()))


def route(
    row: dict[str, bytes | None],
    *,
    columns: dict[str, int] = COLUMNS,
    fields: Mapping[str, tuple[str, ...]] = FIELDS,
    topic: str = "outbox.{aggregate_type}",
    pattern: str | None = None,
    style: HeaderStyle = "plain",
) -> Record:
    outbox = Outbox("public", "outbox", fields)
    router = Router(outbox, TopicTemplate(topic, pattern), style, "/postgresql/db/public.outbox", ANY_TOPIC)
    plan = router.compile(relation(columns))
    assert plan
    frame = frames.insert(7, [row[name] for name in columns])
    record = plan.read(frame, COMMIT_TIME_MS)
    assert plan.read(frame, COMMIT_TIME_MS) == record, "laid out as the first"
    return Record(*record)


def test_plain() -> None:
    assert route(ROW) == ("outbox.order", b'{"a":  1}', b"o-1", [("id", b"e-1"), ("type", b"order.placed")])


def test_own_headers_follow() -> None:
    headers = '{"traceparent": "00-1-2-01", "ä": "ö", "n": 1, "no": null, "deep": {"x": [true]}}'
    assert route({**ROW, "headers": headers.encode()}).headers[2:] == [
        ("traceparent", b"00-1-2-01"),
        ("ä", "ö".encode()),
        ("n", b"1"),
        ("no", None),
        ("deep", b'{"x": [true]}'),
    ]


@pytest.mark.parametrize(
    "value",
    [
        "1.10",
        "123456789012345678901234567890",
        "1e999",
        "-0",
        "9" * 5000,
        '{"x": 1.0 ,"y":[1,  2]}',
        "[" * 300 + "]" * 300,
    ],
)
def test_values_of_headers_travel_as_they_are_written(value: str) -> None:
    headers = f'{{"before": "x", "value" : {value} , "after": null}}'
    assert route({**ROW, "headers": headers.encode()}).headers[2:] == [
        ("before", b"x"),
        ("value", value.encode()),
        ("after", None),
    ]


@pytest.mark.parametrize(
    "headers",
    [
        b"[1]",
        b"{",
        b"\xff",
        b'{"a": NaN}',
        b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"a\\u0000b": "a NUL would cut the name"}',
        b'{"a\\u0000b": 1}',
        b'{"half a pair": "\\ud800"}',
        b'{"\\udc00": 1}',
    ],
)
def test_headers_that_cannot_be_sent_are_poison_and_kept(headers: bytes) -> None:
    with pytest.raises(PoisonEvent, match="header") as caught:
        route({**ROW, "headers": headers})
    assert caught.value.reason == "headers_unreadable"
    outbox = Outbox("public", "outbox", {})
    router = Router(outbox, TopicTemplate("outbox.{aggregate_type}"), "plain", "", ANY_TOPIC)
    row = {**ROW, "headers": headers}
    described = router.describe(relation(COLUMNS), frames.insert(7, [row[name] for name in COLUMNS]), 1)
    assert described.event_id == "e-1"
    assert described.headers[-1][0] == "headers"


LATIN1, ASCII = Encoding("iso8859_1"), Encoding("utf-8")


def stored_router(encoding: Encoding) -> Router:
    outbox = Outbox("public", "outbox", {})
    return Router(outbox, TopicTemplate("{aggregate_type}"), "plain", "", ANY_TOPIC, encoding)


def route_stored(row: dict[str, bytes | None], encoding: Encoding) -> Record:
    router = stored_router(encoding)
    plan = router.compile(relation(COLUMNS))
    assert plan
    return Record(*plan.read(frames.insert(7, [row[name] for name in COLUMNS]), COMMIT_TIME_MS))


def test_text_arrives_as_it_is_stored_and_leaves_as_utf8() -> None:
    row = {**ROW, "aggregate_id": "grün".encode("latin-1"), "payload": '"ß"'.encode("latin-1")}
    record = route_stored(row, LATIN1)
    assert (record.key, record.value) == ("grün".encode(), '"ß"'.encode())
    record = route_stored({**ROW, "aggregate_id": "grün".encode()}, ASCII)
    assert record.key == "grün".encode()


@pytest.mark.parametrize("column", ["id", "aggregate_id", "event_type", "payload", "headers"])
def test_bytes_that_are_no_text_are_poison_and_kept(column: str) -> None:
    row = {**ROW, column: b'{"x": "\xff"}'}
    with pytest.raises(MalformedStream, match="0xff at 7"):
        route_stored(row, ASCII)
    described = stored_router(ASCII).describe(relation(COLUMNS), frames.insert(7, [row[name] for name in COLUMNS]), 1)
    assert described.topic == "order"
    assert described.payload == row["payload"]


def test_headers_may_be_null_in_json_too() -> None:
    assert route({**ROW, "headers": b"null"}) == route(ROW)


@pytest.mark.parametrize("headers", [b"[]", b'"x"', b"{", b'{"a": "\\ud800"}'])
def test_headers_that_are_none_are_poison(headers: bytes) -> None:
    with pytest.raises(PoisonEvent, match="the headers "):
        route({**ROW, "headers": headers})


def test_debezium() -> None:
    assert route(ROW, style="debezium").headers == [("id", b"e-1")]


def test_cloudevents() -> None:
    assert dict(route(ROW, style="cloudevents").headers) == {
        "ce_specversion": b"1.0",
        "ce_id": b"e-1",
        "ce_source": b"/postgresql/db/public.outbox",
        "ce_type": b"order.placed",
        "ce_subject": b"o-1",
        "ce_time": b"2024-05-06T07:08:09.123+00:00",
        "content-type": b"application/json",
    }


@pytest.mark.parametrize(
    ("type_oid", "sent", "value", "media_type"),
    [
        (JSON, b'{"a":  1}', b'{"a":  1}', b"application/json"),
        (JSONB, b'{"a": 1}', b'{"a": 1}', b"application/json"),
        (TEXT, "grüße\n".encode(), "grüße\n".encode(), b"text/plain; charset=utf-8"),
        (BYTEA, b"\\x00ff5c78", b"\x00\xff\\x", b"application/octet-stream"),
        (BYTEA, b"\\x", b"", b"application/octet-stream"),
        (JSON, None, None, b"application/json"),
        (BYTEA, None, None, b"application/octet-stream"),
    ],
)
def test_payload(type_oid: int, sent: bytes | None, value: bytes | None, media_type: bytes) -> None:
    record = route({**ROW, "payload": sent}, columns={**COLUMNS, "payload": type_oid}, style="cloudevents")
    assert record.value == value
    assert dict(record.headers)["content-type"] == media_type


@pytest.mark.parametrize("sent", [b"DEADBEEF", b"\\xABC", b"\\xgg", b""])
def test_a_bytea_that_is_not_hex_is_refused(sent: bytes) -> None:
    with pytest.raises(MalformedStream, match="hex"):
        route({**ROW, "payload": sent}, columns={**COLUMNS, "payload": BYTEA})


def test_debezium_style_table_in_any_column_order() -> None:
    columns = {"payload": JSONB, "type": TEXT, "aggregateid": TEXT, "aggregatetype": TEXT, "id": UUID}
    row: dict[str, bytes | None] = dict(zip(columns, [b"{}", b"t", b"a", b"k", b"i"], strict=True))
    fields = {**FIELDS, "aggregate_type": ("aggregatetype",), "aggregate_id": ("aggregateid",), "event_type": ("type",)}
    record = route(row, columns=columns, fields=fields)
    assert record == ("outbox.k", b"{}", b"a", [("id", b"i"), ("type", b"t")])


def test_topic_of_several_columns_and_of_none() -> None:
    assert route(ROW, topic="{event_type}-{aggregate_type}").topic == "order.placed-order"
    assert route(ROW, topic="all").topic == "all"


def test_an_event_of_a_topic_that_nobody_knows_waits() -> None:
    outbox, known = Outbox("public", "outbox", FIELDS), {"outbox.a"}
    plan = Router(outbox, TopicTemplate("outbox.{aggregate_type}"), "plain", "", known).compile(relation(COLUMNS))
    assert plan
    first, second = (
        frames.insert(7, [{**ROW, "aggregate_type": kind}[name] for name in COLUMNS]) for kind in (b"a", b"b")
    )
    assert plan.read(first, 1)[0] == "outbox.a"
    with pytest.raises(UnknownTopic, match=r"outbox\.b"):
        plan.read(second, 1)
    known.add("outbox.b")
    assert plan.read(second, 1)[0] == "outbox.b"


@pytest.mark.parametrize("name", [b"a b", "ä".encode(), b"a/b", b"", b"x" * 250, b"a\n", b"\xff"])
def test_data_cannot_name_an_illegal_topic(name: bytes) -> None:
    with pytest.raises(PoisonEvent, match=r"is no name that Kafka takes|does not match"):
        route({**ROW, "aggregate_type": name})


@pytest.mark.parametrize("name", [b".", b"..", b"a b"])
def test_no_pattern_makes_an_illegal_topic_a_legal_one(name: bytes) -> None:
    template = TopicTemplate("{aggregate_type}", ".*")
    with pytest.raises(PoisonEvent, match="is no name that Kafka takes"):
        template.render((name,))
    assert template.render((b"...",)) == "..."


def test_data_cannot_name_a_topic_outside_the_pattern() -> None:
    pattern = r"outbox\.(order|run)"
    assert route(ROW, pattern=pattern).topic == "outbox.order"
    with pytest.raises(PoisonEvent, match=re.escape(repr("outbox.orders"))):
        route({**ROW, "aggregate_type": b"orders"}, pattern=pattern)


def test_null_where_there_must_be_a_value_is_poison() -> None:
    with pytest.raises(PoisonEvent, match="aggregate id is NULL"):
        route({**ROW, "aggregate_id": None})
    with pytest.raises(PoisonEvent, match="column aggregate_type is NULL"):
        route({**ROW, "aggregate_type": None})


@pytest.mark.parametrize("template", ["", "a{", "a}", "{}", "{a!r}", "{a:>9}", "a b", ".", "..", "ü{a}", "x" * 250])
def test_bad_templates(template: str) -> None:
    with pytest.raises(ConfigurationError, match=r"kafka\.topic = "):
        TopicTemplate(template)


def test_bad_pattern() -> None:
    with pytest.raises(ConfigurationError, match=r"kafka\.topic_pattern"):
        TopicTemplate("a", "(")


@pytest.mark.parametrize("missing", ["id", "aggregate_id", "event_type", "payload", "aggregate_type"])
def test_a_missing_column_is_named(missing: str) -> None:
    columns = {name: oid for name, oid in COLUMNS.items() if name != missing}
    with pytest.raises(OperatorNeeded, match=f"without column '{missing}'") as caught:
        route(ROW, columns=columns)
    assert f"outbox.columns.{missing}" in caught.value.hint


def test_headers_are_needed_only_when_they_were_mapped() -> None:
    columns = {name: oid for name, oid in COLUMNS.items() if name != "headers"}
    assert route(ROW, columns=columns).headers == [("id", b"e-1"), ("type", b"order.placed")]
    with pytest.raises(OperatorNeeded, match="'meta'"):
        route(ROW, columns=columns, fields={**FIELDS, "headers": ("meta",)})


def test_a_payload_of_another_type_is_refused() -> None:
    with pytest.raises(OperatorNeeded, match="cannot be a payload"):
        route(ROW, columns={**COLUMNS, "payload": TIMESTAMPTZ})


def test_other_relations_have_no_plan() -> None:
    router = Router(Outbox("app", "outbox", FIELDS), TopicTemplate("t"), "plain", "", ANY_TOPIC)
    assert router.compile(relation(COLUMNS)) is None


def test_rows_keep_the_name_that_their_column_had_when_they_were_written() -> None:
    fields = {**FIELDS, "aggregate_id": ("subject", "aggregate_id")}
    older = {**COLUMNS}
    newer = {("subject" if name == "aggregate_id" else name): oid for name, oid in COLUMNS.items()}
    row = {**ROW, "subject": b"o-2"}
    assert route(row, columns=older, fields=fields).key == b"o-1"
    assert route(row, columns=newer, fields=fields).key == b"o-2"
    with pytest.raises(OperatorNeeded, match="come without column 'aggregate_id'") as caught:
        route(row, columns=newer)
    assert "outbox.columns.aggregate_id = ['aggregate_id', '...']" in caught.value.hint


def test_a_table_is_known_by_its_oid_whatever_it_was_called() -> None:
    outbox = Outbox("public", "renamed_since", FIELDS, frozenset({7}))
    router = Router(outbox, TopicTemplate("t"), "plain", "", ANY_TOPIC)
    assert router.compile(relation(COLUMNS))


@pytest.mark.parametrize(
    ("strays", "passes"),
    [
        (Strays(None), False),
        (Strays(None, {"public.outbox"}), True),
        (Strays(frozenset()), True),
        (Strays(frozenset({7})), False),
        (Strays(frozenset({8})), True),
    ],
)
def test_a_row_that_nobody_routes_passes_only_where_its_table_is_not_listed_by_itself(
    strays: Strays, *, passes: bool
) -> None:
    refusal = strays.refusal(relation(COLUMNS))
    assert (refusal is None) == passes
    assert refusal is None or "public.outbox" in refusal.message


def test_a_table_is_named_so_that_the_name_can_be_used() -> None:
    stray = Relation(7, "App", 'Odd "name"', (Column("a", 23),))
    refusal = Strays(None).refusal(stray)
    assert refusal
    assert """outbox.ignore_tables = ['"App"."Odd ""name\"""']""" in refusal.hint


@pytest.mark.parametrize("style", ["plain", "debezium", "cloudevents"])
def test_a_description_has_the_headers_that_its_record_would_have(style: HeaderStyle) -> None:
    router = Router(Outbox("public", "outbox", FIELDS), TopicTemplate("events"), style, "/source", ANY_TOPIC)
    outbox = relation(COLUMNS)
    frame = frames.insert(7, list({**ROW, "headers": b'{"x": "y"}'}.values()))
    plan = router.compile(outbox)
    assert plan
    assert router.describe(outbox, frame, COMMIT_TIME_MS).headers == plan.read(frame, COMMIT_TIME_MS)[3]
    nameless = dict(router.describe(outbox, frames.insert(7, [None] * len(COLUMNS)), COMMIT_TIME_MS).headers)
    assert nameless["ce_id" if style == "cloudevents" else "id"] == b"", "NULL is an empty header"
