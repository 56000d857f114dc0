"""Gates: what a policy says of an event. One for each pair of aggregate type and event type, made when it first comes.

Most pairs need no gate: what is said of all their events is known at once, and allowing them is one look-up. For others
a function is generated of the rules that remain, as `wal.row_plan` generates row plans: only numbers enter its source,
never a word of the policy or of an event. The payload is parsed once, and only if a rule that is reached asks for it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cdc_outbox.relay.headers import Headers
from cdc_outbox.relay.policy.conditions import Condition, all_of, parse_payload, value_at
from cdc_outbox.relay.policy.document import Action, Allow, Approve, Policy, Rule
from cdc_outbox.relay.router import Record

#: Pairs of types that are remembered. Types come from rows: who writes rows decides how many there are.
_MAX_GATES: Final = 10_000
#: Where a field's value is found in a gate, but for headers and the payload.
_SOURCES: Final = {
    "aggregate_id": "text(key)",
    "event_id": "text(event_id)",
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
        #: what is said of all events of these types
        self.settled: dict[Types, Ruling] = {}
        #: by rule in mode watch: events that it would have taken, and those that it could not be evaluated for
        self.watched: dict[str, int] = {rule.id: 0 for rule in policy.rules if rule.is_watched}
        self.watch_errors: dict[str, int] = dict(self.watched)

    def __bool__(self) -> bool:
        """A policy is one, also before the first event has come."""
        return True

    def __missing__(self, types: Types) -> Gate | None:
        if len(self) >= _MAX_GATES:
            self.clear()
            self.settled.clear()
        made = self._make(types)
        if isinstance(made, Ruling):
            self.settled[types] = made
            self[types] = None if made.is_allowed else lambda *_: made
        else:
            self[types] = made
        return self[types]

    def judge(self, types: Types, *event: Any) -> Ruling:
        """As the relay does; of what it allows, too, by which rule."""
        gate = self[types]
        return self.settled[types] if gate is None else gate(*event)

    def _make(self, types: Types) -> Gate | Ruling:
        values = {name: text(value) for name, value in zip(("aggregate_type", "event_type"), types, strict=True)}
        function = _Function(self.policy, values, self.watched, self.watch_errors)
        for rule in self.policy.rules:
            if not _can_never_match(rule, values) and function.add(rule):
                break
        else:
            function.end(self._default)
        return function.ruling or function.compile()


def text(value: bytes | None) -> str | None:
    return None if value is None else str(value, "utf-8", "replace")


def header(headers: Headers, wanted: str) -> str | None:
    for name, value in headers:
        if name == wanted:
            return text(value)
    return None


def field_of(name: str, types: Types, event_id: bytes | None, record: Record) -> str | None:
    """One of an event's text fields."""
    match name:
        case "aggregate_type":
            return text(types[0])
        case "event_type":
            return text(types[1])
        case "event_id":
            return text(event_id)
        case "aggregate_id":
            return text(record.key)
        case "topic":
            return record.topic
    return header(record.headers, name.removeprefix("headers."))


def _can_never_match(rule: Rule, types: Mapping[str, str | None]) -> bool:
    """By the types alone."""
    if any(each.is_static and not each.check(types[each.field]) for each in rule.when):
        return True
    return bool(rule.unless) and all(each.is_static and each.check(types[each.field]) for each in rule.unless)


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
            "text": text,
            "header": header,
            "watched": watched,
            "errors": errors,
        }
        self._lines: list[str] = []
        #: set if all such events are ruled alike
        self.ruling: Ruling | None = None

    def add(self, rule: Rule) -> bool:
        """Whether no later rule can be reached."""
        when = [each for each in rule.when if not each.is_static]
        unless = [each for each in rule.unless if not each.is_static]
        if any(each.is_static and not each.check(self._types[each.field]) for each in rule.unless):
            unless = []  # it cannot hold as a whole
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
        if rule.is_watched:
            name = self._name(rule.id)
            take, give_up = f"watched[{name}] += 1", f"errors[{name}] += 1"
        else:
            error = Ruling(self._policy.on_error, rule.id, rule.sha256, is_error=True)
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
        if not self._lines:
            self.ruling = ruling
        self._lines.append(f"return {self._name(ruling)}")

    def compile(self) -> Gate:
        lines = [f"def gate({_ARGUMENTS}):", " document = None", *(f" {line}" for line in self._lines)]
        exec("\n".join(lines), self._scope)  # noqa: S102 - no word of a policy or an event is in it
        gate: Gate = self._scope["gate"]
        return gate

    def _call(self, condition: Condition) -> str:
        if condition.is_static:
            return repr(bool(condition.check(self._types[condition.field])))
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
