"""For any order of deliveries the watermark never passes an unsettled transaction, and in the end it has passed all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_outbox.errors import BrokenInvariant
from cdc_outbox.relay.watermark import Batch, Watermark


def fail(error: object, message: object) -> None:
    raise AssertionError(error, message)


def publish(watermark: Watermark, events: int, end_lsn: int) -> Batch:
    """One transaction, its batch closed."""
    batch = watermark.current
    batch.outstanding += events
    batch.end_lsn = end_lsn
    watermark.close_batch()
    return batch


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
def test_never_passes_what_is_unsettled(sizes: list[int], data: st.DataObject) -> None:
    watermark = Watermark(fail)
    batches = [publish(watermark, size, (number + 1) * 10) for number, size in enumerate(sizes)]
    deliveries = data.draw(st.permutations([batch for batch in batches for _ in range(batch.outstanding)]))
    for batch in [*deliveries, None]:
        list(watermark.advance())
        unsettled = [batch.end_lsn for batch in batches if batch.outstanding]
        assert watermark.settled_lsn < min(unsettled, default=2**64)
        settled_prefix = [b.end_lsn for b in batches[: next((i for i, b in enumerate(batches) if b.outstanding), None)]]
        assert watermark.settled_lsn == max(settled_prefix, default=0)
        if batch:
            batch.on_delivery(None, None)
    assert watermark.settled_lsn == len(sizes) * 10
    assert watermark.is_empty


def test_a_failed_event_is_never_passed() -> None:
    failures: list[object] = []
    watermark = Watermark(lambda error, _: failures.append(error))
    first, second = publish(watermark, 2, 10), publish(watermark, 1, 20)
    first.on_delivery(None, None)
    first.on_delivery("refused", None)
    second.on_delivery(None, None)
    assert failures == ["refused"]
    assert list(watermark.advance()) == []
    assert watermark.settled_lsn == 0


def test_a_batch_whose_transaction_is_open_is_not_closed() -> None:
    watermark = Watermark(fail)
    watermark.current.outstanding += 1
    watermark.close_batch()
    watermark.current.on_delivery(None, None)
    assert list(watermark.advance()) == []
    assert watermark.settled_lsn == 0


def test_idle_rule() -> None:
    watermark = Watermark(fail)
    watermark.advance_idle(50)
    assert watermark.settled_lsn == 50
    batch = publish(watermark, 1, 60)
    watermark.advance_idle(70)
    assert watermark.settled_lsn == 50, "an event is in flight"
    batch.on_delivery(None, None)
    watermark.advance_idle(70)
    assert watermark.settled_lsn == 50, "its batch has not been settled yet"
    list(watermark.advance())
    watermark.advance_idle(70)
    assert watermark.settled_lsn == 70
    watermark.advance_idle(65)
    assert watermark.settled_lsn == 70, "never backwards"


def test_stepping_back_is_a_bug_and_says_so() -> None:
    watermark = Watermark(fail)
    watermark.advance_idle(50)
    publish(watermark, 0, 40)
    with pytest.raises(BrokenInvariant, match="step back from 0/32 to 0/28"):
        list(watermark.advance())


def test_age_of_the_oldest() -> None:
    watermark = Watermark(fail)
    assert watermark.oldest_commit_time_ms == 0
    watermark.current.first_commit_time_ms = 5
    batch = publish(watermark, 1, 10)
    watermark.current.first_commit_time_ms = 6
    assert watermark.oldest_commit_time_ms == 5
    batch.on_delivery(None, None)
    list(watermark.advance())
    assert watermark.oldest_commit_time_ms == 6
