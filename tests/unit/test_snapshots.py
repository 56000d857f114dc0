"""Which of the last snapshots can be told from: what had to end has ended, what had to be counted is counted."""

from cdc_outbox.journal.snapshots import COUNTED_SECONDS, Snapshot, Snapshots

NOBODY: frozenset[str] = frozenset()


def at(snapshots: Snapshots, second: float, xmin: int, xmax: int, *open_transactions: str) -> tuple[float | None, ...]:
    """When the snapshots were taken that are told from after one more."""
    snapshots.add(Snapshot(second, "", xmin, xmax), frozenset(open_transactions))
    return tuple(told.at if told else None for told in (snapshots.ended, snapshots.counted))


def test_with_nothing_open_the_last_one_is_ended_and_an_older_one_counted() -> None:
    snapshots = Snapshots()
    assert at(snapshots, 0, 5, 5) == (0, None)
    assert at(snapshots, COUNTED_SECONDS, 7, 7) == (COUNTED_SECONDS, None)
    assert at(snapshots, COUNTED_SECONDS + 1, 9, 9) == (COUNTED_SECONDS + 1, 0)


def test_what_was_in_progress_must_have_ended() -> None:
    snapshots = Snapshots()
    assert at(snapshots, 0, 5, 8) == (None, None)
    assert at(snapshots, 1, 7, 9) == (None, None), "7 is older than what had begun by then"
    assert at(snapshots, 2, 8, 10) == (0, None)
    assert at(snapshots, 3, 11, 11) == (3, None)


def test_a_session_that_went_on_in_a_transaction_may_not_have_reported() -> None:
    snapshots = Snapshots()
    at(snapshots, 0, 5, 5)
    assert at(snapshots, COUNTED_SECONDS, 5, 5, "3", "4")[1] is None
    assert at(snapshots, COUNTED_SECONDS + 5, 5, 5, "3")[1] is None
    assert at(snapshots, COUNTED_SECONDS + 6, 5, 5, "9")[1] is None, "it has ended, and reports now"
    assert at(snapshots, COUNTED_SECONDS + 7, 5, 5, "9")[1] == 0


def test_a_transaction_that_lasts_for_hours_costs_no_memory() -> None:
    snapshots = Snapshots()
    for second in range(10_000):
        assert at(snapshots, second, 5, 6 + second) == (None, None)
    assert len(snapshots._kept) < 1000
    assert at(snapshots, 10_000, 20_000, 20_000)[0] == 10_000


def test_transactions_that_overlap_for_ever_hold_nothing_up_for_ever() -> None:
    """Each lasts a quarter of an hour; what is told from is never older than twice that."""
    snapshots, lasts = Snapshots(), 900
    told = [
        at(snapshots, second, max(0, second - lasts), second, str((second // lasts) % 2))
        for second in range(20 * lasts)
    ]
    for second, (ended, counted) in list(enumerate(told))[5 * lasts :]:
        assert ended is not None
        assert second - ended < 2.5 * lasts
        assert counted is not None
        assert second - counted < 4 * lasts
    assert [ended for ended, _ in told if ended] == sorted(ended for ended, _ in told if ended), "it never steps back"
