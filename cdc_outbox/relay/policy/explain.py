"""Why a policy says what it says of an event: every condition of every rule up to the one that decides."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cdc_outbox.relay.policy.conditions import Condition, all_of, parse_payload, value_at
from cdc_outbox.relay.policy.document import Approve, Policy, Rule
from cdc_outbox.relay.policy.gate import Types, field_of
from cdc_outbox.relay.router import Record


@dataclass(frozen=True, slots=True)
class Answer:
    """``clause``: when, unless, or initiator. ``holds``: None if it cannot be told."""

    clause: str
    field: str
    wanted: Any
    holds: bool | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Of one rule. ``matches``: None if it cannot be evaluated, and the event goes where ``on_error`` says."""

    rule: str
    line: int
    verdict: str
    is_watched: bool
    matches: bool | None
    answers: list[Answer]

    @property
    def decides(self) -> bool:
        return self.matches is not False and not self.is_watched


@dataclass(frozen=True, slots=True)
class Judged:
    """An event, as `Gates.judge` takes it."""

    types: Types
    event_id: bytes | None
    record: Record
    commit_time_ms: int
    origin: str = "outbox"

    def value(self, field: str) -> Any:
        """What a condition on ``field`` is asked about."""
        first, _, rest = field.partition(".")
        if first == "payload":
            return value_at(parse_payload(self.record.value), tuple(rest.split(".")))
        if field == "payload_bytes":
            return len(self.record.value or b"")
        if field in ("commit_time", "origin"):
            return self.commit_time_ms if field == "commit_time" else self.origin
        return field_of(field, self.types, self.event_id, self.record)


def explain(policy: Policy, event: Judged) -> Iterator[Explanation]:
    """Rule by rule, up to the one that decides; if none does, the policy's default holds."""
    for rule in policy.rules:
        explanation = _explain_rule(rule, policy.initiator, event)
        yield explanation
        if explanation.decides:
            return


def _explain_rule(rule: Rule, initiator: str | None, event: Judged) -> Explanation:
    when = [_ask("when", condition, event) for condition in rule.when]
    unless = [_ask("unless", condition, event) for condition in rule.unless]
    exempt = all_of(*(answer.holds for answer in unless)) if unless else False
    matches = all_of(*(answer.holds for answer in when), None if exempt is None else not exempt)
    needed = []
    if matches and initiator and isinstance(rule.action, Approve) and not rule.is_watched:
        needed = [Answer("initiator", initiator, {"exists": True}, event.value(initiator) is not None or None)]
        matches = needed[0].holds
    answers = [*when, *unless, *needed]
    return Explanation(rule.id, rule.line, rule.action.verdict, rule.is_watched, matches, answers)


def _ask(clause: str, condition: Condition, event: Judged) -> Answer:
    return Answer(clause, condition.field, condition.wanted, condition.check(event.value(condition.field)))
