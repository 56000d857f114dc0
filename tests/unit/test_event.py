"""What may not be emitted, and how it is told; before any driver."""

import json
import sys
import time
from decimal import Decimal
from enum import StrEnum
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel, ValidationError

from cdc_outbox.outbox import Event, EventRefused, uuid7
from cdc_outbox.outbox.table import OutboxTable


def stated(**more: Any) -> Event:
    return Event(**{"event_type": "opened", "aggregate_id": "a-1", "payload": {"a": 1}, **more})


def circular() -> list[Any]:
    own: list[Any] = []
    own.append(own)
    return own


def deep() -> list[Any]:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    return nested


SECRET = "4111-1111-1111-1111"


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (stated(aggregate_id=""), "aggregate_id is empty"),
        (stated(aggregate_id=None), "aggregate_id is NoneType, not str; flush first"),
        (stated(aggregate_id=42), "aggregate_id is int, not str; str\\(aggregate_id\\)"),
        (stated(aggregate_id=uuid4()), "aggregate_id is UUID, not str"),
        (stated(aggregate_id="a\0b"), "aggregate_id has a NUL"),
        (stated(aggregate_id="a\ud800"), "aggregate_id is no text"),
        (stated(event_type=""), "event_type is empty"),
        (stated(event_type=None), "event_type is NoneType"),
        (stated(event_type="\0"), "event_type has a NUL"),
        (stated(id=None), "id is not a UUID"),
        (stated(id=""), "id is not a UUID"),
        (stated(id="0190163d-8694-739b-aea5-966c26f8ad91"), "id is not a UUID"),
        (stated(aggregate_type=""), "aggregate_type is empty"),
        (stated(aggregate_type="order/eu"), "cannot be part of a topic's name"),
        (stated(aggregate_type="ordér"), "cannot be part of a topic's name"),
        (stated(aggregate_type="order\n"), "cannot be part of a topic's name"),
        (stated(aggregate_type="/"), "cannot be part of a topic's name"),
        (stated(aggregate_type="x" * 243), "is no name that Kafka takes"),
        (stated(headers={"n": 1}), "header 'n' is int, not str"),
        (stated(headers={"n": None}), "header 'n' is NoneType, not str"),
        (stated(headers={1: "n"}), "header with a name of type int is str"),
        (stated(headers={"n\0": "x"}), "a header's name has a NUL"),
        (stated(headers={"n": "x\0"}), "header 'n' has a NUL"),
        (stated(headers={"n": "\udfff"}), "header 'n' is no text"),
        (stated(headers={"": "x"}), "is the relay's own"),
        (stated(headers={"id": "x"}), "header 'id' is the relay's own"),
        (stated(headers={"CE_source": "x"}), "is the relay's own"),
        (stated(headers={"cdc-outbox-redriven": "x"}), "is the relay's own"),
        (stated(headers={"Content-Type": "x"}), "is the relay's own"),
        (stated(headers={"sequence": "7"}), "is the relay's own"),
        (stated(aggregate_id=str(None)), "aggregate_id is 'None', the text of no id; flush first"),
        (stated(event_type="x" * 900_000), "more than max_bytes"),
        (stated(headers=None), "headers must be a mapping, not NoneType"),
        (stated(headers=[("a", "b")]), "headers must be a mapping, not list"),
        (stated(payload={"a": float("nan")}), "Out of range float"),
        (stated(payload=[float("inf")]), "Out of range float"),
        (stated(payload={"a": Decimal("1.1")}), "Decimal is not JSON serializable"),
        (stated(payload={"a": {1, 2}}), "set is not JSON serializable"),
        (stated(payload=object()), "object is not JSON serializable"),
        (stated(payload=circular()), "Circular reference"),
        (stated(payload=deep()), "RecursionError"),
        (stated(payload={"a": "\ud800"}), "surrogates not allowed"),
        (stated(payload="[" * 100_000), "nested too deep"),
        (stated(payload=f"{SECRET}"), "Extra data at character 4"),
        (stated(payload=""), "Expecting value at character 0"),
        (stated(payload="NaN"), "no JSON: NaN is none"),
        (stated(payload="-Infinity"), "no JSON: -Infinity is none"),
        (stated(payload="{'a': 1}"), "Expecting property name"),
        (stated(payload='{"a": "\0"}'), "Invalid control character"),
        (stated(payload="\ufeff{}"), "Unexpected UTF-8 BOM"),
        (stated(payload=b"\xff{}"), "no text in UTF-8: invalid start byte"),
        (stated(payload={"a": "x" * 900_000}), "more than max_bytes = 900,000"),
        (stated(payload="é" * 10, aggregate_id="k" * 899_990), "does not fit a column of type json"),
        (stated(payload=None, aggregate_id="k" * 900_001), "900,007 bytes"),
        (stated(payload=None, headers={"h" * 450_000: "é" * 225_001}), "more than max_bytes"),
    ],
)
def test_what_could_never_be_published_is_refused(event: Event, message: str) -> None:
    with pytest.raises(EventRefused, match=message) as refusal:
        OutboxTable()._check([event])
    told = str(refusal.value)
    assert ";" in told  # a hint
    assert "\n" not in told
    assert len(told) < 500
    assert SECRET not in told
    assert refusal.value.__cause__ is None


def test_numbers_are_not_looked_at() -> None:
    digits = "1" * 10_000
    (text,) = OutboxTable()._check([stated(payload=digits)]).texts
    assert json.loads(text, parse_int=str)[0][1] == digits


def test_what_a_text_column_cannot_keep() -> None:
    with pytest.raises(EventRefused, match="it has a NUL in it"):
        OutboxTable(payload_type="text")._check([stated(payload="a\0")])
    with pytest.raises(EventRefused, match="does not fit a column of type text"):
        OutboxTable(payload_type="text")._check([stated(payload=b"\xff")])
    OutboxTable(payload_type="bytea")._check([stated(payload=b"\xff\0")])


class Kind(StrEnum):
    OPENED = "account.opened"


class Opened(BaseModel):
    account: UUID
    limit: Decimal


def row_of(event: Event, **options: Any) -> tuple[dict[str, Any], str | None]:
    (text,) = OutboxTable(**options)._check([event]).texts
    ((row, payload),) = json.loads(text)
    return row, payload


def test_models_and_enumerations() -> None:
    account = uuid4()
    row, payload = row_of(stated(event_type=Kind.OPENED, payload=Opened(account=account, limit=Decimal("1.10"))))
    assert row["event_type"] == "account.opened"
    assert payload == f'{{"account":"{account}","limit":"1.10"}}'


def test_a_serializer_of_ones_own() -> None:
    import orjson

    assert row_of(stated(payload={"a": [UUID(int=1)]}), serialize=orjson.dumps)[1] == (
        '{"a":["00000000-0000-0000-0000-000000000001"]}'
    )
    assert row_of(stated(payload={"a": 1}), serialize=lambda _: b"\x01\x02", payload_type="bytea")[1] == "\\x0102"
    with pytest.raises(EventRefused, match="does not fit a column of type json"):
        row_of(stated(payload={"a": 1}), serialize=lambda _: b"\x01\x02")


def test_a_validation_hook_says_what_it_likes() -> None:
    class Unknown(Exception):
        pass

    def refuse(event: Event) -> None:
        if event.event_type != "opened":
            raise Unknown

    row_of(stated(), validate=[refuse])
    with pytest.raises(Unknown):
        row_of(stated(event_type="closed"), validate=[refuse])


def test_a_model_for_each_type_of_event() -> None:
    """As the README has it."""
    models = {"account.opened": Opened}

    def check(event: Event) -> None:
        models[event.event_type].model_validate(event.payload)

    opened = {"account": str(UUID(int=1)), "limit": "1.10"}
    row_of(stated(event_type="account.opened", payload=opened), validate=[check])
    with pytest.raises(ValidationError):
        row_of(stated(event_type="account.opened", payload={"account": 1}), validate=[check])
    with pytest.raises(KeyError, match=r"account\.closed"):
        row_of(stated(event_type="account.closed", payload=opened), validate=[check])


@pytest.mark.parametrize("table", ["", "a.b.c", 'a"b', '"a', "a..b", ".a", "a.", "a b", "1a", '""', 'x"; DROP'])
def test_a_table_that_is_no_name(table: str) -> None:
    with pytest.raises(ValueError, match="is not a table name"):
        OutboxTable(table)


@pytest.mark.parametrize(
    ("table", "quoted"),
    [("outbox", '"public"."outbox"'), ("App.OutBox", '"app"."outbox"'), ('"App"."a.""b"', '"App"."a.""b"')],
)
def test_a_table_is_named_as_in_sql(table: str, quoted: str) -> None:
    assert OutboxTable(table)._insert.before.startswith(f"INSERT INTO {quoted} (")


def test_columns_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="'agregate_id' is no field"):
        OutboxTable(columns={"agregate_id": "x"})
    with pytest.raises(ValueError, match="payload needs a column"):
        OutboxTable(columns={"payload": None})
    for field in ("id", "payload", "headers"):
        with pytest.raises(ValueError, match=f"{field} needs a column"):
            OutboxTable(columns={field: ""})
    with pytest.raises(ValueError, match="two fields have column 'data'"):
        OutboxTable(columns={"payload": "data", "headers": "data"})


def test_ids_grow_with_time_and_are_told_apart() -> None:
    before_ms = time.time_ns() // 1_000_000
    ids = [uuid7() for _ in range(10_000)]
    assert len(set(ids)) == len(ids)
    assert {(made.version, made.variant) for made in ids} == {(7, "specified in RFC 4122")}
    assert before_ms <= ids[0].int >> 80 <= ids[-1].int >> 80 <= time.time_ns() // 1_000_000
    ticks = [made.int >> 64 for made in ids]
    assert ticks == sorted(ticks)


def test_the_trace_that_is_current_travels_along() -> None:
    from opentelemetry import trace
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

    span = NonRecordingSpan(SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=TraceFlags(1)))
    with trace.use_span(span):
        own = f"00-{0xABC:032x}-{0xDEF:016x}-01"
        assert row_of(stated(headers={"tenant": "t"}))[0]["headers"] == {"traceparent": own, "tenant": "t"}
        other = {"traceparent": "00-0-0-00"}
        assert row_of(stated(headers=other))[0]["headers"] == other
        assert row_of(stated(), trace=False)[0]["headers"] is None
    assert row_of(stated())[0]["headers"] is None


def test_a_tracing_library_that_nobody_imported_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "opentelemetry"]:
        monkeypatch.delitem(sys.modules, name)
    row_of(stated())
    assert "opentelemetry" not in sys.modules


def test_what_a_serializer_says_of_a_payload_is_not_repeated() -> None:
    def serialize(payload: Any) -> str:
        raise ValueError(f"bad card {payload}")

    class Card(BaseModel):
        def model_dump_json(self, **_: Any) -> str:
            raise ValueError(f"bad card {SECRET}")

    attempts: list[tuple[Event, dict[str, Any]]] = [
        (stated(payload={"card": SECRET}), {"serialize": serialize}),
        (stated(payload=Card()), {}),
    ]
    for event, options in attempts:
        with pytest.raises(EventRefused, match="serializing it ended with ValueError") as refusal:
            OutboxTable(**options)._check([event])
        assert SECRET not in str(refusal.value)


def test_what_slipped_into_another_field_is_not_repeated() -> None:
    for event in (stated(id={"card": SECRET}), stated(event_type={"card": SECRET}), stated(headers={(SECRET,): "x"})):
        with pytest.raises(EventRefused) as refusal:
            OutboxTable()._check([event])
        assert SECRET not in str(refusal.value)


def test_other_mappings_and_sequences() -> None:
    from collections import UserDict
    from types import MappingProxyType

    payload = MappingProxyType({"a": range(3), "b": UserDict(c=(1, 2))})
    assert row_of(stated(payload=payload))[1] == '{"a":[0,1,2],"b":{"c":[1,2]}}'
    for content in (b"abc", bytearray(b"abc"), memoryview(b"abc")):
        with pytest.raises(EventRefused, match="is not JSON serializable"):
            row_of(stated(payload={"token": content}))
        assert row_of(stated(payload=content), payload_type="bytea")[1] == "\\x616263"
    with pytest.raises(EventRefused, match="set is not JSON"):
        row_of(stated(payload={"a": {1}}))


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ('{"a": "\\u0000"}', "NUL in it, which jsonb does not keep"),
        ('{"a": "\\ud800"}', "half a surrogate pair"),
        ("1e200000", "out of jsonb's range"),
        ("1e99999999999999999999", "out of jsonb's range"),
        ("1e-20000", "out of jsonb's range"),
        ("1" * 140_000, "out of jsonb's range"),
        ("[" + ",".join(["1"] * 440_000) + "]", "1,3[0-9]{2},[0-9]{3} bytes, more than max_bytes"),
        ("[" + ",".join(["1e131000"] * 20) + "]", "2,6[0-9]{2},[0-9]{3} bytes"),
        ('{"a":', "no JSON"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_jsonb_keeps_less_and_writes_more(payload: str, message: str) -> None:
    with pytest.raises(EventRefused, match=message):
        OutboxTable(payload_type="jsonb")._check([stated(payload=payload)])
    OutboxTable(payload_type="jsonb")._check([stated(payload='{"a": "\\\\u0000", "b": 1e3, "c": 1.5e-7}')])


def test_the_topic_is_checked_as_the_relay_makes_it() -> None:
    by_type = OutboxTable(topic="{event_type}.{tenant}")
    by_type._check([stated(aggregate_type="not / used")])
    with pytest.raises(EventRefused, match="event_type 'order placed' cannot be part of a topic's name"):
        by_type._check([stated(event_type="order placed")])
    OutboxTable(topic="{aggregate_type}")._check([stated(aggregate_type="x" * 249)])
    for aggregate_type in ("x" * 250, "."):
        with pytest.raises(EventRefused, match="is no name that Kafka takes"):
            OutboxTable(topic="{aggregate_type}")._check([stated(aggregate_type=aggregate_type)])


def test_a_trace_is_left_out_where_there_is_no_column_for_it() -> None:
    from opentelemetry import trace
    from opentelemetry.trace import NonRecordingSpan, SpanContext

    with trace.use_span(NonRecordingSpan(SpanContext(1, 1, is_remote=False))):
        assert "headers" not in row_of(stated(), columns={"headers": None})[0]


def test_large_numbers_of_events_are_cut_into_statements() -> None:
    rows = OutboxTable()._check(stated(payload={"a": "x" * 500_000}) for _ in range(20))
    assert len(rows.ids) == 20
    assert len(rows.texts) == 3
    assert sum(len(json.loads(text)) for text in rows.texts) == 20
