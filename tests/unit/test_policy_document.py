"""A policy file: what it means, and everything that is wrong with it, each with its line."""

import time

import pytest

from cdc_outbox.relay.policy.document import (
    MAX_BYTES,
    Allow,
    Approve,
    Deny,
    Mistake,
    PolicyError,
    Rate,
    Throttle,
    read_policy,
)
from cdc_outbox.relay.policy.lint import warnings_of
from support.policies import EXAMPLE


def mistakes(source: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        read_policy(source.encode())
    return [str(mistake) for mistake in caught.value.mistakes]


def rule(body: str, verdict: str = 'verdict = "allow"') -> str:
    """A policy of one rule, whose first line after its id is line 4."""
    return f'version = 1\n[[rule]]\nid = "r"\n{body}\n{verdict}\n'


def test_the_example_says_what_it_says() -> None:
    policy = read_policy(EXAMPLE)
    assert isinstance(policy.default, Deny)
    assert policy.initiator == "headers.initiator"
    assert policy.on_error == Approve(verdict="approve", approvers=("platform",))
    by_id = {rule.id: rule.action for rule in policy.rules}
    assert by_id["card-number"] == Deny(verdict="deny", keep="hash", then="skip")
    assert by_id["deploy-window"] == Deny(verdict="deny", keep="payload", then="freeze")
    refund, mails = by_id["big-refund"], by_id["email-rate"]
    assert isinstance(refund, Approve)
    assert (refund.approvers, refund.approvals, refund.expires) == (("finance",), 2, 4 * 3600)
    assert refund.show == ("payload.amount", "payload.customer")
    assert isinstance(mails, Throttle)
    assert (mails.rate, mails.by, mails.max_wait) == (Rate(10, 60), ("headers.tenant",), 3600)
    assert [rule.id for rule in policy.rules if rule.is_watched] == ["huge"]
    assert isinstance(by_id["known"], Allow)
    assert warnings_of(policy) == []


def test_without_a_word_events_and_errors_are_denied() -> None:
    policy = read_policy(b"version = 1")
    assert isinstance(policy.default, Deny)
    assert isinstance(policy.on_error, Deny)
    assert policy.rules == ()


def test_a_rule_s_sha256_is_of_what_it_says_and_of_nothing_else() -> None:
    first = read_policy(rule("").encode()).rules[0]
    moved = read_policy(b"# a comment\n\n" + rule("# another").encode()).rules[0]
    changed = read_policy(rule('when = { event_type = "x" }').encode()).rules[0]
    assert first.sha256 == moved.sha256
    assert first.sha256 != changed.sha256


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", ["1: version = 1 is missing"]),
        ("version = 2", ["1: unknown version 2 (1)"]),
        ("version = true", ["1: unknown version True (1)"]),
        ("version = 1\ndefalt = 1", ["2: unknown key 'defalt' (version, default, initiator, on_error, rule)"]),
        ("version = 1\nrule = 3", ["2: rules are written [[rule]]"]),
        ("version = 1\n\ndefault = 'drop'", ["3: unknown verdict 'drop' (allow, deny, approve, throttle)"]),
        ("version = 1\ndefault = 3", ["2: default is a verdict or a table with one"]),
        (
            'version = 1\non_error = "allow"',
            ["2: an evaluation error never publishes: write deny or approve"],
        ),
        (
            'version = 1\n[on_error]\nverdict = "approve"\napprovers = []',
            ["4: approvers = (): Tuple should have at least 1 item after validation, not 0"],
        ),
        ("version = 1\nversion = 1", ["2: it is not TOML: Cannot overwrite a value"]),
        ("version = 1\nx = ", ["2: it is not TOML: Invalid value"]),
        (rule("").replace('id = "r"\n', ""), ["2: rule 1: id is missing"]),
        (rule("").replace('"r"', '"a b"'), ["3: rule a b: id = 'a b': String should match pattern "]),
        (rule("", ""), ["2: rule r: verdict is missing (allow, deny, approve, throttle)"]),
        (rule("", "verdict = []"), ["5: rule r: unknown verdict [] (allow, deny, approve, throttle)"]),
        (
            rule("colour = 1"),
            ["4: rule r: unknown key 'colour' with verdict 'allow' (id, mode, when, "],
        ),
        (rule("when = 1"), ["4: rule r: write conditions, e.g. { event_type = "]),
        (rule("when = { colour = 1 }"), ["4: rule r: unknown field 'colour' (aggregate_type, event_type, "]),
        (rule("when = { payload = 1 }"), ["4: rule r: unknown field 'payload' (aggregate_type, "]),
        (rule('when = { "payload..a" = 1 }'), ["4: rule r: unknown field 'payload..a' (aggregate_type, "]),
        (rule("when = { event_type = 1 }"), ["4: rule r: event_type is text, and 1 is not: write it in quotes"]),
        (
            rule("when = { event_type = [] }"),
            ["4: rule r: event_type is compared with an empty list: that is ne"],
        ),
        (rule("when = { event_type = {} }"), ["4: rule r: event_type has no operator (eq, ne, gt, ge, lt, le, in, "]),
        (rule('when = { origin = "kafka" }'), ["4: rule r: unknown origin 'kafka' (outbox, replay, redrive)"]),
        (
            rule('when = { "payload.a" = { over = 1 } }'),
            ["4: rule r: unknown operator 'over' (eq, ne, gt, ge, lt, le, in, exists)"],
        ),
        (rule('when = { "payload.a" = { gt = nan } }'), ["4: rule r: payload.a is compared with nan: write text, a "]),
        (
            rule('when = { "payload.a" = 2026-01-01 }'),
            ["4: rule r: payload.a is compared with datetime.date(2026"],
        ),
        (rule('when = { "payload.a" = { gt = true } }'), ["4: rule r: gt compares numbers or text, not True"]),
        (rule('when = { "payload.a" = { gt = [1] } }'), ["4: rule r: gt takes one value, not a list"]),
        (rule('when = { "payload.a" = { in = 1 } }'), ["4: rule r: in takes a list, not 1"]),
        (rule('when = { "payload.a" = { exists = "yes" } }'), ["4: rule r: exists is true or false, not 'yes'"]),
        (
            rule('when = { payload_bytes = "many" }'),
            ["4: rule r: payload_bytes is a number: compare it with "],
        ),
        (rule('when = { commit_time = "noon" }'), ["4: rule r: commit_time takes days, hours and zone, e.g. "]),
        (rule('unless = { commit_time = { days = "mo" } }'), ["4: rule r: days = 'mo': write e.g. "]),
        (rule('unless = { commit_time = { hours = "9-25" } }'), ["4: rule r: hours = '9-25': write e.g. "]),
        (
            rule('unless = { commit_time = { hours = "09:00-10:00", zone = "Mars/Base" } }'),
            ["4: rule r: zone = 'Mars/Base' is no time zone that this system knows, e.g. Europe/Berlin"],
        ),
        (rule('keep = "none"', 'verdict = "deny"'), ["4: rule r: keep = 'none': Input should be 'payload' or 'hash'"]),
        (
            rule('rate = "0/min"', 'verdict = "throttle"'),
            ["4: rule r: rate = '0/min': write events per unit of time, e.g. "],
        ),
        (
            rule('rate = "1/min"\nby = ["payload.x"]', 'verdict = "throttle"'),
            ["5: rule r: by: unknown field 'payload.x' (aggregate_type, event_type, "],
        ),
        (
            rule('approvers = ["a"]\nexpires = "soon"', 'verdict = "approve"'),
            ["5: rule r: expires = 'soon': write a number and s, m, h or d, e.g. "],
        ),
        (
            rule('approvers = "a"\napprovals = 0', 'verdict = "approve"'),
            ["4: rule r: approvers = 'a': ", "5: rule r: approvals = 0: Input should be greater than or equal to 1"],
        ),
        (rule("") + rule("").partition("\n")[2], ["7: rule r: its id is taken"]),
    ],
)
def test_what_is_wrong_is_said_with_its_line(source: str, expected: list[str]) -> None:
    said = mistakes(source)
    assert len(said) == len(expected), said
    for line, beginning in zip(said, expected, strict=True):
        assert line.startswith(beginning)


def test_all_mistakes_are_said_at_once_in_the_order_of_their_lines() -> None:
    source = rule("when = { colour = 1 }", 'verdict = "perhaps"') + "\n[[rule]]\nid = 'other'\n\nverdict = 'no'\n"
    assert [line.partition(":")[0] for line in mistakes(source)] == ["4", "5", "10"]


@pytest.mark.parametrize("source", [b"\xff", b"version = 1\nx = '\xff'"])
def test_bytes_that_are_no_text(source: bytes) -> None:
    with pytest.raises(PolicyError, match="it is not UTF-8"):
        read_policy(source)


def test_a_policy_that_is_too_long_or_too_deep() -> None:
    with pytest.raises(PolicyError, match=r"it has 262,145 bytes; a policy has at most 262,144"):
        read_policy(b"#" * (MAX_BYTES + 1))
    with pytest.raises(PolicyError, match="a number that is too long"):
        read_policy(b"version = 1" + b"0" * 5000)
    with pytest.raises(PolicyError, match="nested too deeply"):
        read_policy(b"version = 1\nx = " + b"[" * 100_000)


def warnings(source: str) -> list[Mistake]:
    return warnings_of(read_policy(source.encode()))


@pytest.mark.parametrize(
    ("first", "second", "is_told"),
    [
        ("", 'when = { event_type = "a" }', True),
        ('when = { event_type = "a.*" }', 'when = { event_type = "a.b" }', True),
        ('when = { event_type = "a.*" }', 'when = { event_type = ["a.b", "a.*.c"], "payload.x" = 1 }', True),
        ('when = { event_type = "a.*" }', 'when = { event_type = ["a.b", "b"] }', False),
        ('when = { event_type = "a.*", "payload.x" = 1 }', 'when = { event_type = "a.b" }', False),
        ('when = { event_type = "a.*" }\nunless = { topic = "t" }', 'when = { event_type = "a.b" }', False),
        ('when = { event_type = "a.*" }\nmode = "watch"', 'when = { event_type = "a.b" }', False),
        ("when = { payload_bytes = { gt = 5 } }", "when = { payload_bytes = { gt = 5 } }", True),
    ],
)
def test_a_rule_that_can_never_match_is_told(first: str, second: str, *, is_told: bool) -> None:
    both = rule(first) + rule(second).partition("\n")[2].replace('"r"', '"second"')
    said = [warning for warning in warnings(both) if "can never match" in warning.message]
    assert [warning.rule for warning in said] == (["second"] if is_told else [])


@pytest.mark.parametrize("when", ['"payload.a" = { gt = 5, lt = 3 }', '"payload.a" = { exists = false, eq = 3 }'])
def test_a_condition_that_contradicts_itself_is_told(when: str) -> None:
    assert "it can never match" in warnings(rule(f'when = {{ event_type = "a", {when} }}'))[0].message


def test_many_mistakes_are_told_in_a_moment() -> None:
    """And some of them: nobody reads more."""
    began = time.monotonic()
    assert len(mistakes("\n".join(f"key{number} = 1" for number in range(15_000)))) <= 101
    rules = "".join(f'[[rule]]\nid = "r{number}"\ncolour = 1\nverdict = "allow"\n' for number in range(4_000))
    assert len(mistakes(f"version = 1\n{rules}")) == 100
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("when", ['"payload.a" = 1', '"payload.a" = 1, event_type = "*"'])
def test_a_rule_that_parses_every_payload_is_told(when: str) -> None:
    (warning,) = warnings(rule(f"when = {{ {when} }}"))
    assert (warning.line, warning.rule) == (2, "r")
    assert "it parses the payload of every event" in warning.message
    assert warnings(rule('when = { event_type = "a.*", "payload.a" = 1 }')) == []


def test_approvals_without_a_known_initiator_are_told() -> None:
    source = rule('approvers = ["a"]', 'verdict = "approve"')
    assert "set initiator" in warnings(source)[0].message
    assert warnings('initiator = "headers.by"\n' + source) == []
