"""From a consumed record to a message: whichever client, whichever header style."""

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from cdc_outbox.inbox import Message, NoMessageId
from cdc_outbox.inbox.table import InboxTable

AT = datetime(2026, 11, 27, 12, 0, 0, 123000, UTC)
TIMESTAMP_MS = 1795780800123

PLAIN = [("id", b"e-1"), ("type", b"opened"), ("tenant", b"\xc3\xa9"), ("gone", None)]
CLOUDEVENTS = [
    ("ce_specversion", b"1.0"),
    ("ce_id", b"e-1"),
    ("ce_source", b"/postgresql/app/public.outbox"),
    ("ce_type", b"opened"),
    ("ce_sequence", b"0f"),
]
DEBEZIUM = [("id", b"e-1")]


def confluent(headers: Any, **more: Any) -> Any:
    fields = {"key": b"a-1", "value": b"{}", "timestamp": (1, TIMESTAMP_MS), "error": None, **more}
    fields |= {"topic": "outbox.account", "partition": 3, "offset": 42, "headers": headers}
    return SimpleNamespace(**{name: lambda value=value: value for name, value in fields.items()})


def aiokafka(headers: Any, **more: Any) -> Any:
    return SimpleNamespace(
        **{
            "key": b"a-1",
            "value": b"{}",
            "timestamp": TIMESTAMP_MS,
            "timestamp_type": 0,
            "topic": "outbox.account",
            "partition": 3,
            "offset": 42,
            **more,
        },
        headers=tuple(headers or ()),
    )


@pytest.mark.parametrize(
    ("headers", "kind", "sequence"),
    [(PLAIN, "opened", None), (CLOUDEVENTS, "opened", "0f"), (DEBEZIUM, None, None)],
)
def test_every_style_from_every_client(headers: Any, kind: str | None, sequence: str | None) -> None:
    place: Any = {"topic": "outbox.account", "partition": 3, "offset": 42}
    messages = [
        Message.from_confluent(confluent(headers)),
        Message.from_aiokafka(aiokafka(headers)),
        Message.from_faststream(SimpleNamespace(raw_message=confluent(headers))),
        Message.from_faststream(SimpleNamespace(raw_message=aiokafka(headers))),
        Message.from_headers(headers, key=b"a-1", value=b"{}", committed_at=AT, **place),
        Message.from_headers(dict(headers), key="a-1", value=b"{}", committed_at=AT, **place),
    ]
    (message,) = {message.id: message for message in messages}.values()
    assert all(other == message for other in messages)
    assert (message.id, message.type, message.sequence, message.source) == ("e-1", kind, sequence, "")
    assert (message.key, message.value, message.committed_at, message.redriven) == ("a-1", b"{}", AT, False)


def test_headers_are_text() -> None:
    message = Message.from_confluent(confluent(PLAIN))
    assert message.headers == {"id": "e-1", "type": "opened", "tenant": "é", "gone": None}


def test_the_relays_own_header_counts_and_not_a_later_one_of_that_name() -> None:
    assert Message.from_confluent(confluent([*PLAIN, ("id", b"forged"), ("type", b"forged")])).id == "e-1"


def test_the_id_is_the_one_that_comes_first() -> None:
    """The row's own headers come after the relay's, whichever style that has."""
    message = Message.from_confluent(confluent([*CLOUDEVENTS, ("id", b"customer-42"), ("type", b"vip")]))
    assert (message.id, message.type) == ("e-1", "opened")
    assert Message.from_confluent(confluent([*PLAIN, ("ce_id", b"theirs"), ("ce_type", b"theirs")])).type == "opened"


def test_ids_are_taken_as_they_are_or_not_at_all() -> None:
    for content in (b"\xff\x01", b"x" * 1001, b"a\0"):
        with pytest.raises(NoMessageId):
            Message.from_confluent(confluent([("id", content)]))
    with pytest.raises(NoMessageId, match="is no text"):
        Message("\ud800", AT)


def test_a_topic_that_stamps_records_itself_tells_no_commit_time() -> None:
    assert Message.from_confluent(confluent(PLAIN, timestamp=(2, TIMESTAMP_MS))).committed_at is None
    assert Message.from_confluent(confluent(PLAIN, timestamp=(0, -1))).committed_at is None
    assert Message.from_aiokafka(aiokafka(PLAIN, timestamp_type=1)).committed_at is None


def test_a_tombstone_and_a_record_without_a_key() -> None:
    message = Message.from_confluent(confluent(PLAIN, value=None, key=None))
    assert (message.value, message.key) == (None, None)


def test_a_redriven_one_says_so() -> None:
    assert Message.from_confluent(confluent([*PLAIN, ("cdc-outbox-redriven", b"7")])).redriven


def test_a_source_tells_producers_apart() -> None:
    assert Message.from_aiokafka(aiokafka(PLAIN), source="eu").source == "eu"


@pytest.mark.parametrize("headers", [None, [], [("ID", b"e-1")], [("id", b"")], [("id", None)], [("message-id", b"x")]])
def test_an_id_is_never_guessed(headers: Any) -> None:
    place = r"message .*\[3\]@42: no header id or ce_id; there are: "
    with pytest.raises(NoMessageId, match=place):
        Message.from_confluent(confluent(headers))
    with pytest.raises(NoMessageId, match=place):
        Message.from_aiokafka(aiokafka(headers))


def test_a_time_that_is_none() -> None:
    with pytest.raises(
        ValueError, match=r"message outbox\.account\[3\]@42: its timestamp 1795780800123000 is no time in"
    ):
        Message.from_confluent(confluent(PLAIN, timestamp=(1, TIMESTAMP_MS * 1000)))


def test_what_is_no_message() -> None:
    with pytest.raises(ValueError, match="not a message, but an error: _PARTITION_EOF"):
        Message.from_confluent(confluent(PLAIN, error="_PARTITION_EOF"))
    with pytest.raises(TypeError, match="a batch of messages"):
        Message.from_faststream(SimpleNamespace(raw_message=(aiokafka(PLAIN),)))
    with pytest.raises(NoMessageId, match="NUL"):
        Message("a\0", AT)
    with pytest.raises(ValueError, match="no time zone"):
        Message("a", AT.replace(tzinfo=None))
    with pytest.raises(NoMessageId, match="empty"):
        Message("", AT)


@pytest.mark.parametrize("consumer", ["", "a\0", "x" * 501, "\ud800"])
def test_a_consumer_has_a_name(consumer: str) -> None:
    with pytest.raises(ValueError, match="needs the consumer's name"):
        InboxTable(consumer)
