"""What is suspicious in a policy that is otherwise in order: rules that never match, rules that are dear."""

from collections.abc import Iterator

from cdc_outbox.relay.policy.conditions import STATIC_FIELDS, Condition
from cdc_outbox.relay.policy.document import Approve, Mistake, Policy, Rule


def warnings_of(policy: Policy) -> list[Mistake]:
    """In the order of their lines."""
    found = [*_unreachable(policy), *_dear(policy), *_without_initiator(policy)]
    return sorted(found, key=lambda warning: warning.line)


def _unreachable(policy: Policy) -> Iterator[Mistake]:
    for number, rule in enumerate(policy.rules):
        if contradiction := _contradiction(rule):
            yield Mistake(rule.line, rule.id, f"it can never match: {contradiction}")
            continue
        for earlier in policy.rules[:number]:
            if not earlier.is_watched and not earlier.unless and _takes_all_of(earlier, rule):
                yield Mistake(rule.line, rule.id, f"it can never match: rule {earlier.id} takes all that it could")
                break


def _takes_all_of(earlier: Rule, rule: Rule) -> bool:
    """Whether each condition of ``earlier`` holds wherever those of ``rule`` do, as far as can be told."""
    return all(any(_implies(mine, theirs) for mine in rule.when) for theirs in earlier.when)


def _implies(narrow: Condition, wide: Condition) -> bool:
    if narrow.field != wide.field:
        return False
    if narrow.wanted == wide.wanted:
        return True
    texts = _texts(narrow)
    # a pattern is tried as the text that it is: its * stands for anything, also for a *
    return bool(texts) and _texts(wide) != [] and all(wide.check(each) for each in texts)


def _texts(condition: Condition) -> list[str]:
    """What it may be, where it is a text or a list of texts; else nothing."""
    wanted = condition.wanted if isinstance(condition.wanted, list) else [condition.wanted]
    return wanted if all(isinstance(each, str) for each in wanted) else []


def _contradiction(rule: Rule) -> str:
    for condition in rule.when:
        wanted = condition.wanted
        if not isinstance(wanted, dict) or condition.field == "commit_time":
            continue
        lower = [wanted[each] for each in ("gt", "ge", "eq") if each in wanted]
        upper = [wanted[each] for each in ("lt", "le", "eq") if each in wanted]
        try:
            if any(low > high for low in lower for high in upper):
                return f"{condition.field} cannot be above {max(lower)!r} and below {min(upper)!r}"
        except TypeError:
            return f"{condition.field} is compared with values of two types"
        if condition.payload_path and wanted.get("exists") is False and len(wanted) > 1:
            return f"{condition.field} is compared, and must not exist"
    return ""


def _dear(policy: Policy) -> Iterator[Mistake]:
    for rule in policy.rules:
        asks = any(each.payload_path for each in (*rule.when, *rule.unless))
        if asks and not any(each.field in STATIC_FIELDS and not _is_anything(each) for each in rule.when):
            yield Mistake(rule.line, rule.id, "it parses the payload of every event that comes so far: name its types")


def _is_anything(condition: Condition) -> bool:
    return any(set(each) == {"*"} for each in _texts(condition))


def _without_initiator(policy: Policy) -> Iterator[Mistake]:
    if policy.initiator is None:
        for rule in policy.rules:
            if isinstance(rule.action, Approve):
                what = "nobody is known as its initiator, who must not approve: set initiator"
                yield Mistake(rule.line, rule.id, what)
                return
