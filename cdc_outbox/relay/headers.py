"""Headers: what a record carries beside key and value, in the style that is configured, and the row's own behind it.

Pure. Source: "Kafka Protocol Binding for CloudEvents 1.0"; RFC 8259 (JSON).
"""

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from json import JSONDecoder
from typing import Any, Final, Literal

import orjson

from cdc_outbox.errors import PoisonEvent

HeaderStyle = Literal["plain", "cloudevents", "debezium"]
Headers = list[tuple[str, bytes | None]]
MakeHeaders = Callable[[bytes, bytes, bytes, int], Headers]

#: What a row plan does for the headers of each style; cloudevents has too many for a line.
HEADER_CODE: Final[Mapping[HeaderStyle, str]] = {
    "plain": '[("id", {id}), ("type", {event_type})]',
    "debezium": '[("id", {id})]',
    "cloudevents": "cloudevents({id}, {event_type}, {aggregate_id}, commit_time_ms)",
}

_UNREADABLE: Final = "headers_unreadable"
#: Without one there is no escape in a JSON text, and so no NUL: the cheapest look there is.
_BACKSLASH: Final = ord("\\")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


#: Numbers are kept as text: one of 5,000 digits is JSON, too.
_DECODER: Final = JSONDecoder(parse_int=str, parse_float=str, parse_constant=_refuse_constant)
_MEMBER_NAME: Final = re.compile(r'[\s,]*("(?:[^"\\]|\\.)*")\s*:\s*')


def cloudevents_maker(source: bytes, media_type: bytes) -> MakeHeaders:
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


def own_headers(text: bytes) -> Headers:
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
