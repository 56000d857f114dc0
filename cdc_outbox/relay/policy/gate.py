"""Gates: what a policy says of an event. One for each pair of aggregate type and event type, made when it first comes.

Most pairs need no gate: what is said of all their events is known at once, and allowing them is one look-up. For others
a function is generated of the rules that remain, as `wal.row_plan` generates row plans: only numbers enter its source,
never a word of the policy or of an event. The payload is parsed once, and only if a rule that is reached asks for it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cdc_outbox.relay.headers import Headers
from cdc_outbox.relay.policy.conditions import STATIC_FIELDS, Condition, all_of, parse_payload, value_at
from cdc_outbox.relay.policy.document import Action, Allow, Approve, Deny, Policy, Rule
from cdc_outbox.relay.router import Record, as_text

#: Pairs of types that are remembered, and how long they may be together; gates that are. Types come from rows: who
#: writes rows decides how many there are, and how long.
_MAX_TYPES: Final = 10_000
_LONGEST_REMEMBERED: Final = 500
_MAX_GATES: Final = 200
#: Where a field's value is found in a gate, but for headers and the payload.
_SOURCES: Final = {
    "aggregate_id": "as_text(key)",
    "event_id": "as_text(event_id)",
    "topic": "topic",
    "origin": "origin",
    "payload_bytes": "len(value or b'')",
    "commit_time": "commit_time_ms",
}
_ARGUMENTS: Final = "event_id, topic, value, key, headers, commit_time_ms, origin"


@dataclass(frozen=True, slots=True)
class Ruling:
    """What is to be done with an event, and which rule says so; ``rule`` is empty where none did: the default."""

    action: Action
    rule: str
    rule_sha256: bytes = b""
    #: the rule could not be evaluated, and the action is that of ``on_error``
    is_error: bool = False

    #: a field, not a property: it is asked for each event that has a gate
    is_allowed: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_allowed", isinstance(self.action, Allow))

    @property
    def explanation(self) -> str:
        if self.is_error:
            return f"rule {self.rule} could not be evaluated"
        return f"rule {self.rule}" if self.rule else "no rule allows it"


#: What remains to be asked once an event's types are known; of event id, topic, value, key, headers, commit time in
#: Unix ms, origin.
Gate = Callable[[bytes | None, str, bytes | None, bytes, Headers, int, str], Ruling]
#: Aggregate type and event type.
Types = tuple[bytes | None, bytes | None]


class Gates(dict[Types, Gate | None]):
    """By types: the gate, or None where all such events are allowed."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self._default = Ruling(policy.default, "")
        self._rulings: dict[Types, Ruling | None] = {}
        #: gates by the rules that remain: types are many, such sets are few
        self._made: dict[tuple[object, ...], tuple[Gate | None, Ruling | None]] = {}
        #: by rule in mode watch: events that it would have taken, and those that it could not be evaluated for
        self.watched: dict[str, int] = {rule.id: 0 for rule in policy.rules if rule.is_watched}
        self.watch_errors: dict[str, int] = dict(self.watched)

    def __bool__(self) -> bool:
        """A policy is one, also before the first event has come."""
        return True

    def __missing__(self, types: Types) -> Gate | None:
        if len(self) >= _MAX_TYPES:
            self.clear()
            self._rulings.clear()
        gate, ruling = self._find(types)
        if sum(len(each or b"") for each in types) <= _LONGEST_REMEMBERED:
            self[types], self._rulings[types] = gate, ruling
        return gate

    def by_types(self, types: Types) -> Ruling | None:
        """What is said of all events of these types; None if it depends on the event."""
        return self._rulings[types] if types in self._rulings else self._find(types)[1]

    def judge(self, types: Types, *event: Any) -> Ruling:
        """As the relay does; of what it allows, too, by which rule."""
        gate = self[types]
        if gate is not None:
            return gate(*event)
        ruling = self.by_types(types)
        assert ruling is not None  # that they are all allowed
        return ruling

    def _find(self, types: Types) -> tuple[Gate | None, Ruling | None]:
        values = dict(zip(STATIC_FIELDS, map(as_text, types), strict=True))
        remaining = tuple(rule for rule in self.policy.rules if not _can_never_match(rule, values))
        initiator = self.policy.initiator
        key = (
            *(rule.id for rule in remaining),
            *(rule.id for rule in remaining if _never_exempts(rule, values)),
            values.get(initiator) if initiator else None,
        )
        if key not in self._made:
            if len(self._made) >= _MAX_GATES:
                self._made.clear()
            self._made[key] = self._make(remaining, values)
        return self._made[key]

    def _make(self, rules: Sequence[Rule], values: Mapping[str, str | None]) -> tuple[Gate | None, Ruling | None]:
        function = _Function(self.policy, values, self.watched, self.watch_errors)
        for rule in rules:
            if function.add(rule):
                break
        else:
            function.end(self._default)
        ruling = function.ruling
        if ruling is None or function.is_needed:
            return function.compile(), ruling
        return (None if ruling.is_allowed else lambda *_: ruling), ruling


def header(headers: Headers, wanted: str) -> str | None:
    for name, value in headers:
        if name == wanted:
            return as_text(value)
    return None


def field_of(name: str, types: Types, event_id: bytes | None, record: Record) -> str | None:
    """One of an event's text fields."""
    match name:
        case "aggregate_type":
            return as_text(types[0])
        case "event_type":
            return as_text(types[1])
        case "event_id":
            return as_text(event_id)
        case "aggregate_id":
            return as_text(record.key)
        case "topic":
            return record.topic
    return header(record.headers, name.removeprefix("headers."))


def _on_error(policy: Policy, rule: Rule) -> Action:
    """What the rule would not have stored again is not stored for want of an evaluation either."""
    action = policy.on_error
    if isinstance(action, Deny) and isinstance(rule.action, Deny) and rule.action.keep == "hash":
        return action.model_copy(update={"keep": "hash"})
    return action


def _can_never_match(rule: Rule, types: Mapping[str, str | None]) -> bool:
    """By the types alone."""
    if any(each.is_static and not each.check(types[each.field]) for each in rule.when):
        return True
    return bool(rule.unless) and all(each.is_static and each.check(types[each.field]) for each in rule.unless)


def _never_exempts(rule: Rule, types: Mapping[str, str | None]) -> bool:
    """Whether ``unless`` cannot hold as a whole, by the types alone."""
    return any(each.is_static and not each.check(types[each.field]) for each in rule.unless)


class _Function:
    """The source of one gate, rule by rule."""

    def __init__(
        self, policy: Policy, types: Mapping[str, str | None], watched: dict[str, int], errors: dict[str, int]
    ) -> None:
        self._policy = policy
        self._types = types
        self._scope: dict[str, Any] = {
            "all_of": all_of,
            "parse": parse_payload,
            "at": value_at,
            "as_text": as_text,
            "header": header,
            "watched": watched,
            "errors": errors,
        }
        self._lines: list[str] = []
        #: whether what is said depends on the event; what is said where no rule does
        self._depends = False
        self._end = ""
        #: what is said of all such events; None if it depends on the event
        self.ruling: Ruling | None = None

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to ask, or to count."""
        return bool(self._lines)

    def add(self, rule: Rule) -> bool:
        """Whether no later rule can be reached."""
        when = [each for each in rule.when if not each.is_static]
        unless = [each for each in rule.unless if not each.is_static]
        if _never_exempts(rule, self._types):
            unless = []
        ruling = Ruling(rule.action, rule.id, rule.sha256)
        initiator = self._policy.initiator if isinstance(rule.action, Approve) and not rule.is_watched else None
        if not (when or unless or initiator or rule.is_watched):
            self.end(ruling)
            return True
        plain = [self._call(each) for each in when if not each.payload_path]
        unclear = [self._call(each) for each in when if each.payload_path]
        indent = ""
        if plain:
            self._lines.append(f"if {' and '.join(plain)}:")
            indent = " "
        self._depends |= not rule.is_watched
        if rule.is_watched:
            name = self._name(rule.id)
            take, give_up = f"watched[{name}] += 1", f"errors[{name}] += 1"
        else:
            error = Ruling(_on_error(self._policy, rule), rule.id, rule.sha256, is_error=True)
            take, give_up = f"return {self._name(ruling)}", f"return {self._name(error)}"
        if not (unclear or unless or initiator):
            self._lines.append(f"{indent}{take}")
            return False
        if any(each.payload_path for each in (*when, *unless)):
            self._lines.append(f"{indent}document = document or (parse(value),)")
        self._lines.append(f"{indent}answer = all_of({', '.join(unclear)})")
        if unless:
            self._lines += [
                f"{indent}exempt = all_of({', '.join(map(self._call, unless))})",
                f"{indent}answer = all_of(answer, None if exempt is None else not exempt)",
            ]
        if initiator:
            self._lines.append(f"{indent}answer = answer and ({self._value(initiator)} is not None or None)")
        self._lines += [f"{indent}if answer:", f"{indent} {take}"]
        self._lines += [f"{indent}elif answer is None:", f"{indent} {give_up}"]
        return False

    def end(self, ruling: Ruling) -> None:
        if not self._depends:
            self.ruling = ruling
        self._end = f"return {self._name(ruling)}"

    def compile(self) -> Gate:
        lines = [f"def gate({_ARGUMENTS}):", " document = None", *(f" {line}" for line in self._lines), f" {self._end}"]
        exec("\n".join(lines), self._scope)  # noqa: S102 - no word of a policy or an event is in it
        gate: Gate = self._scope["gate"]
        return gate

    def _call(self, condition: Condition) -> str:
        return f"{self._name(condition.check)}({self._value(condition.field)})"

    def _value(self, field: str) -> str:
        first, _, rest = field.partition(".")
        if first == "payload":
            return f"at(document[0], {self._name(tuple(rest.split('.')))})"
        if first == "headers":
            return f"header(headers, {self._name(rest)})"
        return _SOURCES[field] if field in _SOURCES else self._name(self._types[field])

    def _name(self, value: Any) -> str:
        name = f"c{len(self._scope)}"
        self._scope[name] = value
        return name
