"""The policy file: TOML into rules, or everything that is wrong with it, each with its line.

Nothing is guessed: unknown keys, verdicts and operators are refused. Without a word about it an event is denied, and an
evaluation error never publishes. Source: governance.md, section 2.
"""

import hashlib
import re
import tomllib
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cdc_outbox.relay.policy.conditions import TEXT_FIELDS, Condition, check_field, read_condition

MAX_BYTES: Final = 256 * 1024
#: Finding a mistake's line takes time, and somebody has to read them.
_MOST_MISTAKES: Final = 100
VERDICTS: Final = ("allow", "deny", "approve", "throttle")
_SECONDS: Final = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600, "hour": 3600, "d": 86400, "day": 86400}
_DURATION: Final = re.compile(r"(\d{1,9})(s|m|h|d)", re.ASCII)
_RATE: Final = re.compile(r"(\d{1,9})/(s|sec|min|h|hour|d|day)", re.ASCII)
_RULE_HEAD: Final = re.compile(r"\s*\[\[\s*rule\s*\]\]")
_TABLE_HEAD: Final = re.compile(r"\s*\[")


@dataclass(frozen=True, slots=True)
class Rate:
    """So many events in so many seconds."""

    events: int
    seconds: int


def _duration(text: Any) -> int:
    """Seconds."""
    matched = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if not matched or not int(matched[1]):
        raise ValueError('write a number and s, m, h or d, e.g. "90s" or "4h"')
    return int(matched[1]) * _SECONDS[matched[2]]


def _rate(text: Any) -> Rate:
    matched = _RATE.fullmatch(text) if isinstance(text, str) else None
    if not matched or not int(matched[1]):
        raise ValueError('write events per unit of time, e.g. "10/min" (s, min, h, d)')
    return Rate(int(matched[1]), _SECONDS[matched[2]])


def _field_of_event(name: str) -> str:
    check_field(name)
    return name


def _text_field(name: str) -> str:
    if not name.startswith("headers."):
        check_field(name, (*TEXT_FIELDS, "headers.<name>"))
    return _field_of_event(name)


def _conditions(table: Any) -> tuple[Condition, ...]:
    if not isinstance(table, dict):
        raise ValueError('write conditions, e.g. { event_type = "refund.*" }')  # noqa: TRY004 - pydantic's protocol
    return tuple(read_condition(field, wanted) for field, wanted in table.items())


_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
_FromList = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
_Words = Annotated[tuple[_Word, ...], Field(min_length=1), _FromList]
_Names = Annotated[tuple[str, ...], _FromList]
_Duration = Annotated[int, BeforeValidator(_duration)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)


class Allow(_Strict):
    verdict: Literal["allow"]


class Deny(_Strict):
    verdict: Literal["deny"]
    #: whether the payload is kept, or only its SHA-256
    keep: Literal["payload", "hash"] = "payload"
    #: what follows in the lane: passes, or waits for `holds skip`
    then: Literal["skip", "freeze"] = "skip"


class Approve(_Strict):
    verdict: Literal["approve"]
    #: groups; one member of any of them may decide
    approvers: _Words
    #: how many different people must approve
    approvals: Annotated[int, Field(ge=1, le=100)] = 1
    #: denied after so many seconds; None: never
    expires: _Duration | None = None
    #: what the list of holds shows of the event
    show: Annotated[_Names, AfterValidator(lambda names: tuple(map(_field_of_event, names)))] = ()
    then: Literal["skip", "freeze"] = "skip"


class Throttle(_Strict):
    verdict: Literal["throttle"]
    rate: Annotated[Rate, BeforeValidator(_rate)]
    #: events with the same values share a rate
    by: Annotated[_Names, AfterValidator(lambda names: tuple(map(_text_field, names)))] = ()
    #: denied if it would wait longer, in seconds; None: it waits as long as it takes
    max_wait: _Duration | None = None
    then: Literal["skip", "freeze"] = "skip"


Action = Allow | Deny | Approve | Throttle


class _Clauses(_Strict):
    id: _Word
    mode: Literal["enforce", "watch"] = "enforce"
    when: Annotated[tuple[Condition, ...], BeforeValidator(_conditions)] = ()
    unless: Annotated[tuple[Condition, ...], BeforeValidator(_conditions)] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """``line``: of its head in the file. ``sha256``: of what it says, whatever the rest of the file says."""

    id: str
    line: int
    is_watched: bool
    when: tuple[Condition, ...]
    unless: tuple[Condition, ...]
    action: Action
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Policy:
    """``sha256``: of the file's bytes. ``initiator``: the field that says who started it."""

    rules: tuple[Rule, ...]
    default: Action
    on_error: Action
    initiator: str | None
    sha256: bytes

    @property
    def beyond_this_version(self) -> str:
        """What in it the relay cannot do yet; empty if it can do all."""
        for name, action in [(rule.id, rule.action) for rule in self.rules] + [
            ("default", self.default),
            ("on_error", self.on_error),
        ]:
            if isinstance(action, Approve | Throttle):
                return f"{name}: verdict {action.verdict} comes with a later version; this one can allow and deny"
            if isinstance(action, Deny) and action.then == "freeze":
                return f'{name}: then = "freeze" comes with a later version'
        return ""


@dataclass(frozen=True, slots=True)
class Mistake:
    line: int
    #: empty outside of rules
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.line}: {f'rule {self.rule}: ' if self.rule else ''}{self.message}"


class PolicyError(Exception):
    def __init__(self, mistakes: list[Mistake]) -> None:
        super().__init__("; ".join(map(str, mistakes)))
        self.mistakes = mistakes


def read_policy(source: bytes) -> Policy:
    """Raises PolicyError with all mistakes, in the order of their lines."""
    if len(source) > MAX_BYTES:
        raise PolicyError([Mistake(1, "", f"it has {len(source):,} bytes; a policy has at most {MAX_BYTES:,}")])
    try:
        text = source.decode()
        table = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise PolicyError([Mistake(source[: error.start].count(b"\n") + 1, "", "it is not UTF-8")]) from None
    except tomllib.TOMLDecodeError as error:
        raise PolicyError([_not_toml(str(error), text.count("\n") + 1)]) from None
    except RecursionError:
        raise PolicyError([Mistake(1, "", "it is nested too deeply")]) from None
    except ValueError:  # an integer of thousands of digits
        raise PolicyError([Mistake(1, "", "it has a number that is too long")]) from None
    return _Reader(text, table, hashlib.sha256(source).digest()).read()


def _not_toml(message: str, last_line: int) -> Mistake:
    where = re.search(r" \(at line (\d+), column \d+\)| \(at end of document\)", message)
    line = int(where[1]) if where and where[1] else last_line
    return Mistake(line, "", f"it is not TOML: {message[: where.start()] if where else message}")


class _Reader:
    """One reading of a file: it goes on after a mistake."""

    def __init__(self, text: str, table: dict[str, Any], sha256: bytes) -> None:
        self._lines = text.splitlines()
        self._table = table
        self._sha256 = sha256
        self._heads = [number for number, line in enumerate(self._lines, 1) if _RULE_HEAD.match(line)]
        self._mistakes: list[Mistake] = []

    def read(self) -> Policy:
        self._check_top()
        default = self._action_of("default", {"verdict": "deny"})
        on_error = self._action_of("on_error", {"verdict": "deny"})
        if isinstance(on_error, Allow):
            self._mistake("on_error", "an evaluation error never publishes: write deny or approve")
        initiator = self._table.get("initiator")
        if initiator is not None:
            try:
                _text_field(initiator)
            except (AttributeError, ValueError) as error:
                self._mistake("initiator", str(error))
        tables = self._table.get("rule", [])
        if not isinstance(tables, list) or not all(isinstance(each, dict) for each in tables):
            self._mistake("rule", "rules are written [[rule]]")
            tables = []
        rules = []
        for number, each in enumerate(tables):
            if len(self._mistakes) < _MOST_MISTAKES and (rule := self._rule(number, each)):
                rules.append(rule)
        self._check_ids(tables)
        if self._mistakes:
            raise PolicyError(sorted(self._mistakes, key=lambda mistake: mistake.line))
        assert default is not None
        assert on_error is not None
        return Policy(tuple(rules), default, on_error, initiator, self._sha256)

    def _check_top(self) -> None:
        allowed = ("version", "default", "initiator", "on_error", "rule")
        for key in sorted(self._table.keys() - set(allowed))[:_MOST_MISTAKES]:
            self._mistake(key, f"unknown key {key!r} ({', '.join(allowed)})")
        if "version" not in self._table:
            self._mistake("version", "version = 1 is missing")
        elif self._table["version"] != 1 or self._table["version"] is True:
            self._mistake("version", f"unknown version {self._table['version']!r} (1)")

    def _action_of(self, key: str, default: dict[str, Any]) -> Action | None:
        """Of `default` and `on_error`: a verdict, or a table with one."""
        given = self._table.get(key, default)
        table = {"verdict": given} if isinstance(given, str) else given
        if not isinstance(table, dict):
            self._mistake(key, f"{key} is a verdict or a table with one")
            return None
        action = self._model(_action_model(table), table, lambda inner: self._line_of(key, inner), "")
        if isinstance(action, Throttle):
            self._mistake(key, f"{key} cannot be throttle: write a rule")
        return action  # type: ignore[return-value]

    def _rule(self, number: int, table: dict[str, Any]) -> Rule | None:
        name = str(table.get("id", number + 1))[:63]
        head = self._heads[number] if number < len(self._heads) else self._line_of("rule")

        def line_of(key: str) -> int:
            return self._line_in_rule(head, key)

        if "id" not in table:
            self._mistakes.append(Mistake(head, name, "id is missing"))
            table = {**table, "id": "unnamed"}
        model = _action_model(table)
        clauses = {key: value for key, value in table.items() if key in _Clauses.model_fields}
        rest = {key: value for key, value in table.items() if key not in clauses}
        read = self._model(_Clauses, clauses, line_of, name)
        action = self._model(model, rest, line_of, name)
        if not isinstance(read, _Clauses) or action is None:
            return None
        said = orjson.dumps(table, option=orjson.OPT_SORT_KEYS, default=str)
        return Rule(read.id, head, read.mode == "watch", read.when, read.unless, action, hashlib.sha256(said).digest())  # type: ignore[arg-type]

    def _model(self, model: type[_Strict] | None, table: dict[str, Any], line_of: Any, rule: str) -> _Strict | None:
        if model is None:
            given = table.get("verdict")
            what = "verdict is missing" if given is None else f"unknown verdict {given!r}"
            self._mistakes.append(Mistake(line_of("verdict"), rule, f"{what} ({', '.join(VERDICTS)})"))
            return None
        try:
            return model.model_validate(table)
        except ValidationError as error:
            for found in error.errors(include_url=False)[:_MOST_MISTAKES]:
                key = str(found["loc"][0])
                self._mistakes.append(Mistake(line_of(key), rule, _explain(key, found, model)))
            return None

    def _check_ids(self, tables: list[dict[str, Any]]) -> None:
        seen: set[Any] = set()
        for number, table in enumerate(tables):
            name = str(table.get("id", ""))[:63]
            if name in seen and number < len(self._heads) and len(self._mistakes) < _MOST_MISTAKES:
                self._mistakes.append(Mistake(self._line_in_rule(self._heads[number], "id"), name, "its id is taken"))
            seen.add(name)

    def _mistake(self, key: str, message: str) -> None:
        self._mistakes.append(Mistake(self._line_of(key), "", message))

    def _line_of(self, key: str, inner: str = "") -> int:
        """Of a key outside of rules; 1 if it is not found."""
        end = self._heads[0] - 1 if self._heads else len(self._lines)
        wanted = re.compile(rf"\s*(\[\s*)?[\"']?{re.escape(key)}[\"']?\s*(\]|\.|=)")
        found = (number for number in range(1, end + 1) if wanted.match(self._lines[number - 1]))
        line = next(found, 1)
        return self._line_in_rule(line, inner) if inner and _TABLE_HEAD.match(self._lines[line - 1]) else line

    def _line_in_rule(self, head: int, key: str) -> int:
        """Of a key in the table that begins at line ``head``; ``head`` itself if it is not found."""
        wanted = re.compile(rf"\s*(\[\s*rule\s*\.\s*)?[\"']?{re.escape(key)}[\"']?\s*(\]|\.|=)")
        for number in range(head + 1, len(self._lines) + 1):
            line = self._lines[number - 1]
            if wanted.match(line):
                return number
            if _RULE_HEAD.match(line):
                break
        return head


def _action_model(table: dict[str, Any]) -> type[_Strict] | None:
    models: dict[Any, type[_Strict]] = {"allow": Allow, "deny": Deny, "approve": Approve, "throttle": Throttle}
    verdict = table.get("verdict")
    return models.get(verdict) if isinstance(verdict, str) else None


def _explain(key: str, found: Any, model: type[_Strict]) -> str:
    allowed = model.model_fields
    if found["type"] == "extra_forbidden":
        more = [] if model is not _Clauses else ["verdict"]
        where = f" with verdict {allowed['verdict'].annotation.__args__[0]!r}" if "verdict" in allowed else ""  # type: ignore[union-attr]
        return f"unknown key {key!r}{where} ({', '.join([*_Clauses.model_fields, *allowed, *more])})"
    if found["type"] == "missing":
        return f"{key} is missing"
    message = found["msg"].removeprefix("Value error, ")
    if key in ("when", "unless", "show", "by") and found["type"] == "value_error":
        return f"{key}: {message}" if key in ("show", "by") else str(message)
    return f"{key} = {_shown(found['input'])}: {message}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
