"""Conditions of a rule: what a field of an event must be like, compiled into a function of the field's value.

A check of a text field, of a number or of the commit time says True or False. One of the payload may also say None: it
is unclear, because the field is missing, of another type, or the payload is no JSON. An unclear condition is never
False: the rule's event then goes where ``on_error`` says, and not to the next rule.
Source: governance.md, section 2. orjson decides what JSON is: of duplicate keys the last counts.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from enum import Enum
from math import isfinite
from typing import Any, Final
from zoneinfo import ZoneInfo

import orjson

#: Known of an event without looking at it: what the gates are memoised by.
STATIC_FIELDS: Final = ("aggregate_type", "event_type")
TEXT_FIELDS: Final = (*STATIC_FIELDS, "aggregate_id", "event_id", "topic", "origin")
ORIGINS: Final = ("outbox", "replay", "redrive")
_FIELDS: Final = (*TEXT_FIELDS, "headers.<name>", "payload.<path>", "payload_bytes", "commit_time")
_OPERATORS: Final = ("eq", "ne", "gt", "ge", "lt", "le", "in", "exists")
_TIME: Final = re.compile(r"(\d\d):(\d\d)", re.ASCII)
_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

#: True or False; None if it cannot be told.
Check = Callable[[Any], bool | None]
_Scalar = str | int | float | bool


class Absent(Enum):
    """What a payload has instead of a value."""

    #: no such field, or no payload at all
    MISSING = 1
    #: it is no JSON
    UNREADABLE = 2


@dataclass(frozen=True, slots=True)
class Condition:
    """``field`` as in the file; ``wanted``: what stands there; ``check``: of the field's value."""

    field: str
    wanted: Any
    check: Check

    @property
    def is_static(self) -> bool:
        return self.field in STATIC_FIELDS

    @property
    def payload_path(self) -> tuple[str, ...]:
        """Empty unless it is about the payload."""
        first, *path = self.field.split(".")
        return tuple(path) if first == "payload" else ()


def read_condition(field: str, wanted: Any) -> Condition:
    """Raises ValueError saying what is wrong and what is allowed."""
    check_field(field)
    if field == "commit_time":
        return Condition(field, wanted, _within(wanted))
    if field == "payload_bytes":
        return Condition(field, wanted, _number_check(wanted))
    if field.startswith("payload."):
        return Condition(field, wanted, _payload_check(field, wanted))
    return Condition(field, wanted, _text_check(field, wanted))


def check_field(field: str, allowed: tuple[str, ...] = _FIELDS) -> None:
    """Raises ValueError unless events have such a field."""
    name, *rest = field.split(".")
    pattern = {"headers": "headers.<name>", "payload": "payload.<path>"}.get(name, field)
    if pattern not in allowed or (name in ("headers", "payload")) != bool(rest) or not all(rest):
        raise ValueError(f"unknown field {field!r} ({', '.join(allowed)})")


def parse_payload(value: bytes | None) -> Any:
    """The payload as JSON, or why there is none."""
    if value is None:
        return Absent.MISSING
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return Absent.UNREADABLE


def value_at(document: Any, path: tuple[str, ...]) -> Any:
    """What stands there in a parsed payload, or why nothing does. Only objects are entered."""
    if document is Absent.UNREADABLE:
        return document
    for name in path:
        if type(document) is not dict or name not in document:
            return Absent.MISSING
        document = document[name]
    return document


def _text_check(field: str, wanted: Any) -> Check:
    tests = [_text_test(operator, operand, field) for operator, operand in _operations(wanted, field)]
    return tests[0] if len(tests) == 1 else lambda value: all(test(value) for test in tests)


def _text_test(operator: str, operand: Any, field: str) -> Check:
    """None as a value: the event has no such field."""
    if operator == "exists":
        return lambda value: (value is not None) is operand
    constants = operand if isinstance(operand, list) else [operand]
    if wrong := [constant for constant in constants if not isinstance(constant, str)]:
        raise ValueError(f"{field} is text, and {wrong[0]!r} is not: write it in quotes")
    if field == "origin" and (strange := [each for each in constants if each not in ORIGINS]):
        raise ValueError(f"unknown origin {strange[0]!r} ({', '.join(ORIGINS)})")
    if operator in ("is", "in", "eq"):
        globs = operator == "is" and any("*" in constant for constant in constants)
        return _matches_one_of(constants) if globs else frozenset(constants).__contains__
    test = _comparison(operator, operand)
    if operator == "ne":
        return lambda value: value is None or test(value)
    return lambda value: value is not None and test(value)


def _number_check(wanted: Any) -> Check:
    tests = []
    for operator, operand in _operations(wanted, "payload_bytes"):
        constants = operand if isinstance(operand, list) else [operand]
        if operator == "exists" or not all(_kind(constant) is int for constant in constants):
            raise ValueError("payload_bytes is a number: compare it with numbers, e.g. { gt = 200_000 }")
        tests.append(_comparison(operator, operand))
    return lambda value: all(test(value) for test in tests)


def _payload_check(field: str, wanted: Any) -> Check:
    """Of what `value_at` found."""
    tests = [_payload_test(operator, operand) for operator, operand in _operations(wanted, field)]
    return tests[0] if len(tests) == 1 else lambda value: all_of(*(test(value) for test in tests))


def _payload_test(operator: str, operand: Any) -> Check:
    if operator == "exists":

        def exists(value: Any) -> bool | None:
            return None if value is Absent.UNREADABLE else (value is not Absent.MISSING) is operand

        return exists
    kinds = {_kind(constant) for constant in (operand if isinstance(operand, list) else [operand])}
    test = _comparison(operator, operand)

    def compare(value: Any) -> bool | None:
        return test(value) if _kind(value) in kinds else None

    return compare


def all_of(*answers: bool | None) -> bool | None:
    """False if one is False; else None if one is unclear."""
    if False in answers:
        return False
    return None if None in answers else True


def _kind(value: Any) -> type:
    """JSON has one kind of number, and true is none."""
    return int if type(value) is float else type(value)


def _operations(wanted: Any, field: str) -> list[tuple[str, Any]]:
    """Operators and operands; a plain value or a list of them has the operator "is", with globs. Raises ValueError."""
    if not isinstance(wanted, Mapping):
        _check_operand("is", wanted, field)
        return [("is", wanted)]
    if not wanted:
        raise ValueError(f"{field} has no operator ({', '.join(_OPERATORS)})")
    for operator, operand in wanted.items():
        if operator not in _OPERATORS:
            raise ValueError(f"unknown operator {operator!r} ({', '.join(_OPERATORS)})")
        _check_operand(operator, operand, field)
    return list(wanted.items())


def _check_operand(operator: str, operand: Any, field: str) -> None:
    if operator == "exists":
        if not isinstance(operand, bool):
            raise ValueError(f"exists is true or false, not {operand!r}")
        return
    if operator == "in" and not isinstance(operand, list):
        raise ValueError(f"in takes a list, not {operand!r}")
    if isinstance(operand, list):
        if operator not in ("in", "is"):
            raise ValueError(f"{operator} takes one value, not a list")
        if not operand:
            raise ValueError(f"{field} is compared with an empty list: that is never so")
    for constant in operand if isinstance(operand, list) else [operand]:
        _check_constant(operator, constant, field)


def _check_constant(operator: str, constant: Any, field: str) -> None:
    if not isinstance(constant, _Scalar) or (isinstance(constant, float) and not isfinite(constant)):
        raise ValueError(f"{field} is compared with {constant!r}: write text, a number, true or false")
    if isinstance(constant, int) and not -(2**63) <= constant < 2**63:
        raise ValueError(f"{field} is compared with an integer beyond 64 bits: write it as 1e20, for example")
    if isinstance(constant, bool) and operator in ("gt", "ge", "lt", "le"):
        raise ValueError(f"{operator} compares numbers or text, not {constant!r}")


def _comparison(operator: str, operand: Any) -> Callable[[Any], bool]:
    """Of a value of a kind that `operand` has. bool and int are told apart: 1 is not true."""
    match operator:
        case "is":
            return _any_of(operand if isinstance(operand, list) else [operand])
        case "in":
            return _equals_one_of(operand)
        case "eq":
            return lambda value: value == operand and _kind(value) is _kind(operand)
        case "ne":
            return lambda value: value != operand or _kind(value) is not _kind(operand)
        case "gt":
            return lambda value: value > operand
        case "ge":
            return lambda value: value >= operand
        case "lt":
            return lambda value: value < operand
        case _:
            return lambda value: value <= operand


def _equals_one_of(constants: list[_Scalar]) -> Callable[[Any], bool]:
    known = frozenset((_kind(constant), constant) for constant in constants)
    return lambda value: (_kind(value), value) in known


def _any_of(constants: list[_Scalar]) -> Callable[[Any], bool]:
    """Text with a * is a pattern: any number of any characters."""
    globs = [each for each in constants if isinstance(each, str) and "*" in each]
    plain = _equals_one_of([each for each in constants if each not in globs])
    if not globs:
        return plain
    matches = _matches_one_of(globs)
    return lambda value: plain(value) or (type(value) is str and matches(value))


def _matches_one_of(globs: list[str]) -> Callable[[str | None], bool]:
    """Each takes time in proportion to the text: no regular expression, which many a * would make try for ever."""
    prefixes = tuple(glob[:-1] for glob in globs if glob.endswith("*") and glob.count("*") == 1)
    others = [glob.split("*") for glob in globs if not (glob.endswith("*") and glob.count("*") == 1)]
    if not others:
        return lambda value: value is not None and value.startswith(prefixes)
    return lambda value: (
        value is not None and (value.startswith(prefixes) or any(_is_made_of(value, parts) for parts in others))
    )


def _is_made_of(value: str, parts: list[str]) -> bool:
    """Whether it begins with the first part, ends with the last, and has the others between them, in order."""
    if len(parts) == 1:
        return value == parts[0]
    first, *middle, last = parts
    at, end = len(first), len(value) - len(last)
    if at > end or not value.startswith(first) or not value.endswith(last):
        return False
    for part in middle:
        found = value.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


def _within(wanted: Any) -> Check:
    """Of the commit time in Unix ms: whether it lies on these days, within these hours. Raises ValueError."""
    if not isinstance(wanted, Mapping) or not wanted.keys() & {"days", "hours"}:
        raise ValueError('commit_time takes days, hours and zone, e.g. { days = "mon-fri", hours = "09:00-17:00" }')
    if unknown := wanted.keys() - {"days", "hours", "zone"}:
        raise ValueError(f"unknown key {min(unknown)!r} of commit_time (days, hours, zone)")
    days = _days(wanted.get("days", "mon-sun"))
    begin, end = _hours(wanted.get("hours", "00:00-24:00"))
    zone = _zone(wanted.get("zone", "UTC"))

    def within(commit_time_ms: int) -> bool:
        moment = datetime.fromtimestamp(commit_time_ms / 1000, zone)
        minute = moment.hour * 60 + moment.minute
        if begin < end:
            return begin <= minute < end and moment.weekday() in days
        # over midnight: what comes after it belongs to the day before
        return (minute >= begin and moment.weekday() in days) or (minute < end and (moment.weekday() - 1) % 7 in days)

    return within


def _days(text: Any) -> frozenset[int]:
    days: set[int] = set()
    try:
        for part in text.lower().replace(" ", "").split(","):
            first, _, last = part.partition("-")
            begin, end = _DAYS.index(first), _DAYS.index(last or first)
            days.update(range(begin, end + 1) if begin <= end else (*range(begin, 7), *range(end + 1)))
    except (AttributeError, ValueError):
        raise ValueError(f'days = {text!r}: write e.g. "mon-fri" or "sat,sun" ({", ".join(_DAYS)})') from None
    return frozenset(days)


def _hours(text: Any) -> tuple[int, int]:
    """Minutes of the day."""
    try:
        begin, end = (_minute(part) for part in text.split("-"))
    except (AttributeError, ValueError):
        raise ValueError(f'hours = {text!r}: write e.g. "09:00-16:00"') from None
    if begin == end:
        raise ValueError(f"hours = {text!r}: it begins where it ends")
    return begin, end


def _minute(text: str) -> int:
    hour, minute = (int(part) for part in _TIME.fullmatch(text.strip()).groups())  # type: ignore[union-attr]
    if hour * 60 + minute > 24 * 60 or minute > 59:
        raise ValueError
    return hour * 60 + minute


def _zone(name: Any) -> tzinfo:
    if name == "UTC":
        return UTC  # also where the system has no time zones
    try:
        return ZoneInfo(name)
    except (OSError, TypeError, ValueError, LookupError):
        raise ValueError(f"zone = {name!r} is no time zone that this system knows, e.g. Europe/Berlin") from None
