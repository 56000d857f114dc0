"""A payload as it will be stored: text for json, jsonb and text, bytes for bytea; refused where it cannot be."""

import json
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Final, Literal

from cdc_outbox.outbox.event import Payload

PayloadType = Literal["json", "jsonb", "text", "bytea"]

#: The digits that jsonb keeps of a number, before the point and behind it; it writes all of them out.
_JSONB_DIGITS: Final = 131_072
_JSONB_SCALE: Final = 16_383


class UnfitPayload(Exception):
    """Why, without a word of what is in it."""


def to_json(payload: Payload) -> str:
    """As ``json.dumps`` does, without spaces, or as the object does. Raises TypeError, ValueError, RecursionError."""
    if dump := _dump_of(payload):
        return dump()
    return json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain)


def _dump_of(payload: Payload) -> Callable[[], str] | None:
    """Not isinstance of HasModelDumpJson: that costs ten times as much, for each event."""
    dump: Callable[[], str] | None = getattr(payload, "model_dump_json", None)
    return dump


def stored_payload(payload: Payload, kind: PayloadType, serialize: Callable[[Any], str | bytes]) -> str | bytes | None:
    """Bytes for a bytea, else text; None is a tombstone. Raises UnfitPayload.

    What jsonb keeps is for ``size_bytes`` to see, which reads it anyway.
    """
    if payload is None:
        return None
    if isinstance(payload, bytearray | memoryview):  # as drivers give a bytea
        payload = bytes(payload)
    is_ours = serialize is to_json and not isinstance(payload, str | bytes) and _dump_of(payload) is None
    made = payload if isinstance(payload, str | bytes) else _serialized(payload, serialize, is_ours=is_ours)
    if kind == "bytea":
        return _encoded(made)
    text = _decoded(made)
    if kind == "json" and not is_ours:
        _parsed(text, number=str)  # as text: one of 5,000 digits is JSON, too
    if "\0" in text:
        raise UnfitPayload("it has a NUL in it, which only a bytea keeps")
    return text


def size_bytes(stored: str | bytes | None, kind: PayloadType) -> int:
    """As Kafka gets it. jsonb rewrites it: with spaces, and every digit. Raises UnfitPayload."""
    if stored is None:
        return 0
    if isinstance(stored, bytes):
        return len(stored)
    return _jsonb_bytes(stored) if kind == "jsonb" else len(stored.encode())


def _serialized(payload: Any, serialize: Callable[[Any], str | bytes], *, is_ours: bool) -> str | bytes:
    try:
        made = serialize(payload)
    except (TypeError, ValueError, RecursionError) as error:
        # what another's serializer says may hold what it was given
        what = f"{type(error).__name__}: {error}" if is_ours else f"serializing it ended with {type(error).__name__}"
        raise UnfitPayload(what) from None
    if not isinstance(made, str | bytes):
        raise UnfitPayload(f"serialize returned {type(made).__name__}, neither text nor bytes")
    return made


def _plain(value: object) -> object:
    """Of what json.dumps does not know: mappings and sequences of other kinds."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _encoded(made: str | bytes) -> bytes:
    try:
        return made.encode() if isinstance(made, str) else made
    except UnicodeEncodeError as error:
        raise UnfitPayload(f"it is no text: {error.reason}") from None


def _decoded(made: str | bytes) -> str:
    try:
        text = made.decode() if isinstance(made, bytes) else made
        text.encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise UnfitPayload(f"it is no text in UTF-8: {error.reason}") from None
    return text


def _parsed(text: str, *, number: Callable[[str], object]) -> object:
    try:
        return json.loads(text, parse_int=number, parse_float=number, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise UnfitPayload(f"it is no JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise UnfitPayload("it is nested too deep") from None


def _jsonb_bytes(text: str) -> int:
    numbers: list[str] = []  # as jsonb writes them

    def number(written: str) -> int:
        numbers.append(_digits(written))
        return 0

    read = _parsed(text, number=number)
    try:
        rest = json.dumps(read, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UnfitPayload("it has half a surrogate pair in it, which jsonb does not keep") from None
    if b"\\u0000" in rest.replace(rb"\\", b""):  # without backslashes that are text themselves
        raise UnfitPayload("it has a NUL in it, which jsonb does not keep")
    return len(rest) + sum(len(digits) - 1 for digits in numbers)


def _digits(number: str) -> str:
    """As many as jsonb writes: all before the point, and all behind it."""
    try:
        sign, digits, exponent = Decimal(number).as_tuple()
    except InvalidOperation:
        sign, digits, exponent = 0, (), "F"
    if not isinstance(exponent, int) or len(digits) + exponent > _JSONB_DIGITS or -exponent > _JSONB_SCALE:
        raise UnfitPayload("it has a number in it that is out of jsonb's range")
    behind = 1 - exponent if exponent < 0 else 0  # with the point
    return "0" * (sign + max(len(digits) + exponent, 1) + behind)


def _refuse_constant(name: str) -> None:
    raise UnfitPayload(f"it is no JSON: {name} is none")
