"""The watermark: up to which LSN everything is settled, and so may be confirmed.

Events are counted into the current batch before they are published; the batch's own ``on_delivery`` counts them out.
Batches stand in a queue in commit order, and only its head moves the watermark: never a maximum over acknowledgements.

Pure bookkeeping, one thread; it knows neither Kafka nor clocks.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

from cdc_outbox.errors import BrokenInvariant
from cdc_outbox.wal.lsn import LSN

#: Called with a delivery report's error and message; raises what is to be done about it.
OnFailure = Callable[[Any, Any], None]


class Batch:
    """A run of events, published together and confirmed together.

    What it confirms is the last transaction that committed in it; nothing (``end_lsn`` 0) while none has.
    """

    __slots__ = (
        "_on_failure",
        "end_lsn",
        "events",
        "first_commit_time_ms",
        "outstanding",
        "per_topic",
        "redriven",
        "written_lsn",
    )

    def __init__(self, on_failure: OnFailure) -> None:
        self._on_failure = on_failure
        #: end of the last transaction in the batch, as a plain int (hot loop)
        self.end_lsn = 0
        #: when the oldest transaction in it committed, Unix milliseconds; 0 while it is empty
        self.first_commit_time_ms = 0
        #: events counted in and not yet acknowledged
        self.outstanding = 0
        #: events of the transactions that have committed
        self.events = 0
        #: events by topic, for the metrics
        self.per_topic: defaultdict[str, int] = defaultdict(int)
        #: requests, and the dead letters that were published again in it: recorded before the batch is passed
        self.redriven: list[tuple[int, int]] = []
        #: end of the log after what was written to the journal for it, if standbys must have that first; else 0
        self.written_lsn = LSN(0)

    def on_delivery(self, error: object, message: object) -> None:
        """librdkafka's delivery report. A failed event stays outstanding: nothing after it is ever confirmed.

        A bound method of the batch, not a closure per event: nothing is allocated for it.
        """
        if error is not None:
            self._on_failure(error, message)
        else:
            self.outstanding -= 1


class Watermark:
    def __init__(self, on_failure: OnFailure, started_at: int = 0) -> None:
        """``started_at``: an LSN up to which everything is settled; 0 if there is none."""
        self._on_failure = on_failure
        self._queue: deque[Batch] = deque()
        self.current = Batch(on_failure)
        #: what may be confirmed; 0 as long as nothing is known to be settled
        self.settled_lsn = LSN(started_at)

    def close_batch(self) -> Batch | None:
        """Queue the current batch and begin another. It will confirm the last transaction that committed in it.

        None if none has: then nothing is done.
        """
        closed = self.current
        if not closed.end_lsn:
            return None
        self._queue.append(closed)
        self.current = Batch(self._on_failure)
        return closed

    def advance(self) -> Iterator[Batch]:
        """Move over the batches at the head in which nothing is outstanding, oldest first.

        Each is passed when the next one is asked for: what is to be recorded of it is recorded before that, and if that
        fails it has not been passed.
        """
        while self._queue and not self._queue[0].outstanding:
            yield self._queue[0]
            self._move_to(self._queue.popleft().end_lsn)

    def advance_idle(self, wal_end: int) -> None:
        """The idle rule: nothing received is unsettled, so what the server skipped up to here is settled too.

        The caller knows that the stream is not inside a transaction. Source: PostgreSQL's own apply worker
        (get_flush_position in worker.c). A transaction that is still open at ``wal_end`` arrives when it commits.
        """
        if self.is_empty and wal_end > self.settled_lsn:
            self._move_to(wal_end)

    @property
    def is_empty(self) -> bool:
        return not self._queue and not self.current.outstanding and not self.current.end_lsn

    @property
    def outstanding(self) -> int:
        """Events published and not yet acknowledged."""
        return self.current.outstanding + sum(batch.outstanding for batch in self._queue)

    @property
    def oldest_commit_time_ms(self) -> int:
        """When the oldest unsettled transaction committed, Unix milliseconds; 0 if there is none."""
        oldest = self._queue[0] if self._queue else self.current
        return oldest.first_commit_time_ms

    def _move_to(self, lsn: int) -> None:
        if lsn < self.settled_lsn:
            raise BrokenInvariant(f"the watermark would step back from {self.settled_lsn} to {LSN(lsn)}")
        self.settled_lsn = LSN(lsn)
