"""Throttling: bursts pass up to the rate, what comes too early waits for its slot."""

from hypothesis import given
from hypothesis import strategies as st

from cdc_outbox.relay.policy.document import Rate
from cdc_outbox.relay.policy.throttle import Slots


def test_a_burst_passes_and_the_rest_waits_for_a_slot_each() -> None:
    slots = Slots(Rate(10, 60))
    waits = [slots.wait_seconds(("a",), 1000.0) for _ in range(12)]
    assert waits == [*[0.0] * 10, 6.0, 12.0]
    assert slots.wait_seconds(("b",), 1000.0) == 0.0, "another key has slots of its own"
    assert slots.wait_seconds(("a",), 1072.0) == 0.0


def test_a_slot_can_be_given_back() -> None:
    slots = Slots(Rate(1, 60))
    assert slots.wait_seconds((), 0.0) == 0.0
    assert slots.wait_seconds((), 0.0) == 60.0
    slots.give_back(())
    assert slots.wait_seconds((), 0.0) == 60.0


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=60).map(sorted), st.integers(1, 5))
def test_no_window_has_more_than_the_rate_twice_over(times: list[float], events: int) -> None:
    """GCRA lets a full burst and what is earned meanwhile pass in one window: never more than that."""
    slots = Slots(Rate(events, 60))
    passed = sorted(now + slots.wait_seconds((), now) for now in times)
    for first in range(len(passed)):
        inside = sum(passed[first] <= each < passed[first] + 60 - 1e-6 for each in passed[first:])
        assert inside <= 2 * events
