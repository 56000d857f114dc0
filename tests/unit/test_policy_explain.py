"""An explanation says what the gate says, and why."""

import orjson
from hypothesis import given
from hypothesis import strategies as st

from cdc_outbox.relay.policy.document import read_policy
from cdc_outbox.relay.policy.explain import Judged, explain
from cdc_outbox.relay.policy.gate import Gates
from cdc_outbox.relay.router import Record
from support.policies import EXAMPLE

POLICY = read_policy(EXAMPLE)
GATES = Gates(POLICY)
VALUES = st.none() | st.booleans() | st.integers(0, 1000) | st.sampled_from(["501", "x", {}, {"number": 1}])
PAYLOADS = st.dictionaries(st.sampled_from(["amount", "card"]), VALUES).map(orjson.dumps)
EVENTS = st.builds(
    Judged,
    st.tuples(
        st.sampled_from([None, b"order", b"refund", b"strange"]),
        st.sampled_from([None, b"refund.asked", b"email.send", b"customer.new", b"prod.deploy", b"x"]),
    ),
    st.sampled_from([b"e-1", None]),
    st.builds(
        Record,
        st.just("outbox.a"),
        PAYLOADS | st.sampled_from([None, b"no JSON"]),
        st.just(b"k"),
        st.sampled_from([[], [("initiator", b"agent")]]),
    ),
    st.integers(0, 10**13),
    st.sampled_from(["outbox", "redrive", "replay"]),
)


@given(EVENTS)
def test_it_agrees_with_the_gate(event: Judged) -> None:
    ruling = GATES.judge(event.types, event.event_id, *event.record, event.commit_time_ms, event.origin)
    told = list(explain(POLICY, event))
    deciding = [each for each in told if each.decides]
    assert [each.rule for each in deciding] == ([ruling.rule] if ruling.rule else [])
    assert told[-1:] == deciding or not deciding
    if deciding:
        assert (deciding[0].matches is None) == ruling.is_error


def test_it_names_each_condition() -> None:
    record = Record("outbox.refund", b'{"amount": 620}', b"k", [("initiator", b"a")])
    *_, last = explain(POLICY, Judged((b"refund", b"refund.asked"), b"e", record, 0))
    assert (last.rule, last.verdict, last.matches) == ("big-refund", "approve", True)
    assert [(answer.clause, answer.field, answer.holds) for answer in last.answers] == [
        ("when", "event_type", True),
        ("when", "payload.amount", True),
        ("initiator", "headers.initiator", True),
    ]
