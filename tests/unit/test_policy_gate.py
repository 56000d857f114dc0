"""What a policy says of an event, whatever the event holds: an evaluation error never publishes."""

import re
import time
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_outbox.relay.policy.conditions import read_condition
from cdc_outbox.relay.policy.document import Deny, read_policy
from cdc_outbox.relay.policy.gate import Gates, Ruling
from support.policies import EXAMPLE

TUESDAY_10_BERLIN_MS = 1_764_061_200_000


def gates(source: str) -> Gates:
    return Gates(read_policy(f"version = 1\n{source}".encode()))


def rule(when: str, more: str = "", verdict: str = "allow") -> str:
    return f'[[rule]]\nid = "r"\nwhen = {{ {when} }}\nverdict = "{verdict}"\n{more}\n'


def judge(
    policy: Gates,
    event_type: bytes | None = b"a.b",
    payload: bytes | None = b"{}",
    *,
    aggregate_type: bytes | None = b"order",
    headers: Any = (),
    origin: str = "outbox",
    key: bytes = b"k-1",
    commit_time_ms: int = 0,
) -> Ruling:
    """Twice: the second time the gate is there."""
    event = (b"e-1", "outbox.order", payload, key, list(headers), commit_time_ms, origin)
    first = policy.judge((aggregate_type, event_type), *event)
    assert policy.judge((aggregate_type, event_type), *event) == first
    return first


def matches(when: str, payload: bytes | None = b"{}", **more: Any) -> bool | None:
    """None: an evaluation error."""
    ruling = judge(gates(rule(when)), payload=payload, **more)
    if ruling.is_error:
        assert ruling.action.verdict == "deny"
        return None
    return ruling.rule == "r"


def test_the_first_rule_that_matches_decides() -> None:
    policy = Gates(read_policy(EXAMPLE))
    agent = [("initiator", b"agent-7")]

    def said(event_type: bytes, payload: bytes = b"{}", headers: Any = agent, **more: Any) -> tuple[str, str, bool]:
        ruling = judge(policy, event_type, payload, headers=headers, **more)
        return ruling.rule, ruling.action.verdict, ruling.is_error

    assert said(b"order.created") == ("known", "allow", False)
    assert said(b"order.created", aggregate_type=b"strange") == ("", "deny", False)
    assert said(b"refund.asked", b'{"amount": 501}') == ("big-refund", "approve", False)
    assert said(b"refund.asked", b'{"amount": 500}') == ("known", "allow", False)
    assert said(b"refund.asked", b'{"amount": "501"}') == ("big-refund", "approve", True)
    assert said(b"refund.asked", b'{"amount": 501}', []) == ("big-refund", "approve", True), "nobody is its initiator"
    assert said(b"refund.asked", b'{"amount": 1}', origin="redrive") == ("replayed-effects", "approve", False)
    assert said(b"customer.changed", b'{"card": {"number": null}}') == ("card-number", "deny", False)
    assert said(b"customer.changed", b"no JSON") == ("card-number", "approve", True)
    assert said(b"email.send") == ("email-rate", "throttle", False)
    assert said(b"prod.deploy") == ("deploy-window", "deny", False)
    assert said(b"prod.deploy", commit_time_ms=TUESDAY_10_BERLIN_MS) == ("known", "allow", False)


def test_what_a_rule_in_mode_watch_would_take_is_counted_and_goes_on() -> None:
    watching = rule('"payload.n" = { gt = 5 }', 'mode = "watch"', "deny")
    policy = gates(f'{watching}[[rule]]\nid = "all"\nverdict = "allow"\n')
    for payload in (b'{"n": 9}', b'{"n": 1}', b'{"n": "x"}'):
        assert judge(policy, payload=payload).rule == "all"
    assert (policy.watched, policy.watch_errors) == ({"r": 2}, {"r": 2})


@pytest.mark.parametrize(
    ("when", "payload", "expected"),
    [
        # numbers, text and booleans are told apart; a comparison with another type is unclear
        ('"payload.a" = 1', b'{"a": 1}', True),
        ('"payload.a" = 1', b'{"a": 1.0}', True),
        ('"payload.a" = 1', b'{"a": true}', None),
        ('"payload.a" = 1', b'{"a": "1"}', None),
        ('"payload.a" = true', b'{"a": true}', True),
        ('"payload.a" = true', b'{"a": 1}', None),
        ('"payload.a" = "x*"', b'{"a": "xyz\\n"}', True),
        ('"payload.a" = { eq = "x*" }', b'{"a": "xyz"}', False),
        ('"payload.a" = ["x", 1]', b'{"a": 1}', True),
        ('"payload.a" = ["x", 1]', b'{"a": null}', None),
        ('"payload.a" = { in = [1, 2] }', b'{"a": 3}', False),
        ('"payload.a" = { ne = 1 }', b'{"a": 2}', True),
        ('"payload.a" = { ne = 1 }', b"{}", None),
        ('"payload.a" = { gt = 1, le = 5 }', b'{"a": 5}', True),
        ('"payload.a" = { gt = 1, le = 5 }', b'{"a": 6}', False),
        ('"payload.a" = { ge = "2026-01" }', b'{"a": "2026-02"}', True),
        ('"payload.a" = { gt = 500 }', b'{"a": 123456789012345678901234567890}', True),
        ('"payload.a" = { gt = 500 }', b'{"a": 1e999}', None),
        ('"payload.a" = { gt = 500 }', b'{"a": NaN}', None),
        # what is missing, or no JSON
        ('"payload.a" = { gt = 1 }', b"{}", None),
        ('"payload.a" = { gt = 1 }', None, None),
        ('"payload.a" = { gt = 1 }', b"", None),
        ('"payload.a" = { gt = 1 }', b"\xff", None),
        ('"payload.a" = { exists = true }', b'{"a": null}', True),
        ('"payload.a" = { exists = true }', b"[]", False),
        ('"payload.a" = { exists = true }', None, False),
        ('"payload.a" = { exists = true }', b"{", None),
        ('"payload.a" = { exists = false }', b"{}", True),
        ('"payload.a.b" = { exists = true }', b'{"a": [{"b": 1}]}', False),
        ('"payload.a.b" = 1', b'{"a": {"b": 1}}', True),
        # of duplicate keys the last counts
        ('"payload.a" = { gt = 500 }', b'{"a": 1, "a": 501}', True),
        # an unclear condition is an error only where all others hold
        ('"payload.a" = 1, "payload.b" = 1', b'{"b": 2}', False),
        ('"payload.a" = 1, "headers.x" = "y"', b"{}", False),
        ("payload_bytes = { ge = 2 }", b"{}", True),
        ("payload_bytes = { ge = 2 }", None, False),
        ('event_type = "a.*", aggregate_id = "k-*", topic = "outbox.*", event_id = "e-1"', b"{}", True),
        ('"headers.x" = { ne = "y" }', b"{}", True),
        ('"headers.x" = { exists = false }', b"{}", True),
    ],
)
def test_conditions(when: str, payload: bytes | None, expected: bool | None) -> None:  # noqa: FBT001
    assert matches(when, payload) is expected


def test_types_may_be_missing() -> None:
    assert matches('event_type = "*"', event_type=None) is False
    assert matches("event_type = { exists = false }", event_type=None) is True
    assert matches('aggregate_type = { ne = "x" }', aggregate_type=None) is True


def test_a_payload_nested_too_deeply_is_unclear() -> None:
    assert matches('"payload.a" = { exists = true }', b'{"a":' * 5000 + b"1" + b"}" * 5000) is None


@pytest.mark.parametrize(
    ("unless", "payload", "expected"),
    [
        ('event_type = "a.*"', b"{}", "default"),
        ('event_type = "z", "payload.a" = 1', b"{}", "r"),
        ('"payload.a" = 1', b'{"a": 1}', "default"),
        ('"payload.a" = 1', b'{"a": 2}', "r"),
        ('"payload.a" = 1', b"{}", "error"),
        ('"payload.a" = 1, topic = "other"', b"{}", "r"),
    ],
)
def test_exceptions(unless: str, payload: bytes, expected: str) -> None:
    ruling = judge(gates(rule('event_type = "*"', f"unless = {{ {unless} }}")), payload=payload)
    assert ("error" if ruling.is_error else ruling.rule or "default") == expected


@pytest.mark.parametrize(
    ("window", "hour_utc", "expected"),
    [
        ('hours = "09:00-16:00", zone = "Europe/Berlin"', 8, True),
        ('hours = "09:00-16:00", zone = "Europe/Berlin"', 15, False),
        ('hours = "22:00-06:00"', 23, True),
        ('hours = "22:00-06:00", days = "mon"', 3, True),
        ('hours = "22:00-06:00", days = "tue"', 3, False),
        ('days = "sat-mon"', 9, False),
        ('days = "mon,tue"', 9, True),
    ],
)
def test_commit_times(window: str, hour_utc: int, expected: bool) -> None:  # noqa: FBT001
    """2025-11-25, a Tuesday."""
    commit_time_ms = TUESDAY_10_BERLIN_MS + (hour_utc - 9) * 3_600_000
    assert matches(f"commit_time = {{ {window} }}", commit_time_ms=commit_time_ms) is expected


def test_allowing_by_type_needs_no_gate() -> None:
    policy = gates(rule('event_type = ["a.*", "b"]'))
    assert policy[b"order", b"a.b"] is None
    assert policy[b"order", b"c"] is not None


def test_types_are_remembered_up_to_a_bound() -> None:
    policy = gates(rule('event_type = "a.*"'))
    for number in range(25_000):
        assert judge(policy, b"a.%d" % number).rule == "r"
    assert len(policy) <= 10_000
    assert len(policy._made) == 1, "one gate for all of them"


def test_long_types_are_not_remembered() -> None:
    policy = gates(rule('event_type = "a.*", "payload.x" = 1'))
    assert judge(policy, b"a." + b"x" * 1000, b'{"x": 1}').rule == "r"
    assert judge(policy, b"b" * 1000).action.verdict == "deny"
    assert len(policy) == 0


def test_what_is_not_to_be_stored_is_not_stored_for_want_of_an_evaluation() -> None:
    policy = gates(rule('event_type = "a.*", "payload.card" = { exists = true }', 'keep = "hash"', "deny"))
    ruling = judge(policy, payload=b"\xef\xbb\xbf{}")
    assert ruling.is_error
    assert isinstance(ruling.action, Deny)
    assert ruling.action.keep == "hash"


@given(st.text("ab*", max_size=6), st.text("ab\n", max_size=8))
def test_a_star_stands_for_anything(glob: str, value: str) -> None:
    """As the regular expression would say, on texts that are short enough for it."""
    expected = re.fullmatch(".*".join(map(re.escape, glob.split("*"))), value, re.DOTALL) is not None
    assert read_condition("topic", glob).check(value) is expected
    assert read_condition("topic", [glob, "other*", "*x*"]).check(value) is expected
    assert read_condition("payload.a", [glob, 1]).check(value) is expected


def test_many_stars_cost_no_more_than_the_text_is_long() -> None:
    check = read_condition("headers.x", "*a*a*a*a*a*a*a*b").check
    began = time.monotonic()
    assert check("a" * 1_000_000) is False
    assert time.monotonic() - began < 1


NAMES = st.sampled_from(["a", "b", "payload", "__import__('os')", "ü", ""])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@given(JSON.map(orjson.dumps) | st.binary(max_size=20) | st.none())
def test_whatever_a_payload_holds_a_ruling_comes(payload: bytes | None) -> None:
    policy = gates(rule('"payload.a" = { gt = 5 }, "payload.b.a" = ["x*", true]'))
    ruling = judge(policy, payload=payload)
    if not ruling.is_error and ruling.rule:
        document = orjson.loads(payload or b"")
        assert document["a"] > 5


def test_a_rule_in_mode_watch_changes_nothing_that_is_said_by_types() -> None:
    watching = rule("payload_bytes = { gt = 1 }", 'mode = "watch"', "deny")
    policy = gates(f'{watching}[[rule]]\nid = "all"\nverdict = "deny"\n')
    ruling = policy.by_types((b"order", b"a.b"))
    assert ruling is not None
    assert (ruling.rule, ruling.is_allowed) == ("all", False)
    assert judge(policy) == ruling
    assert policy.watched == {"r": 2}
