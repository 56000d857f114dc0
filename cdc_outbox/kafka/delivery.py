"""Delivery: what a session needs of Kafka, however it is written to.

`acknowledged` is the form there is: an event is settled by its delivery report. A form with transactions commits one
for each batch in ``close_batch``, with the batch's ``end_lsn`` in it, and counts that as one event more that is
outstanding in the batch until it is done.
"""

from typing import Protocol

from cdc_outbox.relay.pipeline import Publisher
from cdc_outbox.relay.watermark import Batch


class Delivery(Publisher, Protocol):
    """Raises from ``poll``, ``flush`` and ``close_batch`` what a failed report means."""

    @property
    def unreachable(self) -> str | None:
        """Why no broker can be reached at the moment; None while one can."""
        ...

    @property
    def in_flight(self) -> int:
        """Events handed over whose report was not served yet."""
        ...

    def close_batch(self, batch: Batch) -> None:
        """All transactions up to ``batch.end_lsn`` are published. It is settled when nothing is outstanding in it.

        At a session's end in trouble it may hold the head of one more transaction, which is sent again.
        """
        ...

    def poll(self, timeout_seconds: float) -> None:
        """Serve reports, waiting for the first at most ``timeout_seconds``."""
        ...

    def flush(self, timeout_seconds: float) -> None:
        """Send what lingers and serve its reports, waiting at most ``timeout_seconds``."""
        ...

    def probe(self) -> None:
        """If there was trouble, find out whether any broker answers: see ``unreachable``."""
        ...

    def publish_in_batches(self) -> None:
        """No event is published alone any more."""
        ...
