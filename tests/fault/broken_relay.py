"""Relays that each break one promise, for the checker to be tried on: `python -m fault.broken_relay <how>`."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from cdc_outbox.__main__ import run
from cdc_outbox.kafka.acknowledged import AcknowledgedDelivery
from cdc_outbox.relay.watermark import Batch, Watermark
from cdc_outbox.wal import pgoutput

Publish = Callable[..., None]


def confirms_too_early() -> None:
    """A batch is taken for settled as soon as it is closed."""

    def advance(self: Watermark) -> Iterator[Batch]:
        settled = list(self._queue)
        self._queue.clear()
        for batch in settled:
            self._move_to(batch.end_lsn)
            yield batch

    Watermark.advance = advance  # type: ignore[method-assign]


def drops_a_row() -> None:
    def wrap(publish: Publish) -> Publish:
        count = 0

        def dropping(*record: Any) -> None:
            nonlocal count
            count += 1
            if count == 100:
                record[4](None, None)
            else:
                publish(*record)

        return dropping

    _wrap_publish(wrap)


def swaps_two_events_of_a_key() -> None:
    def wrap(publish: Publish) -> Publish:
        count = 0
        held: list[tuple[Any, ...]] = []

        def swapping(*record: Any) -> None:
            nonlocal count
            count += 1
            if count == 100:
                held.append(record)
                return
            publish(*record)
            if held and (held[0][0], held[0][2]) == (record[0], record[2]):
                publish(*held.pop())

        return swapping

    _wrap_publish(wrap)


def confirms_a_rows_lsn() -> None:
    """Something inside the transaction, instead of its end; the idle rule hides that only when events are rare."""
    read_commit, advance_idle = pgoutput.read_commit, Watermark.advance_idle
    committed_at = 0.0

    def inside(frame: bytes) -> tuple[int, int, int]:
        nonlocal committed_at
        committed_at = time.monotonic()
        _, commit_lsn, _ = read_commit(frame)
        return commit_lsn - 1, commit_lsn, commit_lsn - 1

    def advance_idle_later(self: Watermark, wal_end: int) -> None:
        if time.monotonic() - committed_at > 1:
            advance_idle(self, wal_end)

    pgoutput.read_commit = inside
    Watermark.advance_idle = advance_idle_later  # type: ignore[method-assign]


def _wrap_publish(wrap: Callable[[Publish], Publish]) -> None:
    make = AcknowledgedDelivery.__init__

    def wrapped(self: AcknowledgedDelivery, *arguments: Any, **more: Any) -> None:
        make(self, *arguments, **{**more, "wrap": wrap})

    AcknowledgedDelivery.__init__ = wrapped  # type: ignore[method-assign]


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    sys.argv[1:] = ["run"]
    run()
