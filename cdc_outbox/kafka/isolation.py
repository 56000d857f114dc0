"""Isolation: events published one at a time, to find the one that the broker refuses.

The broker refuses a whole batch for one of its events, so a failed report does not name the culprit. Alone, an event is
refused for its own sake. What may pass is sent again after a pause; nothing is sent twice that was acknowledged.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from confluent_kafka import KafkaError, KafkaException

from cdc_outbox.kafka.refusals import Verdict, explain, verdict_on

if TYPE_CHECKING:
    from cdc_outbox.errors import CdcOutboxError

#: How often an event that is refused for a reason we do not expect is tried, and the pauses between.
_TRIES: Final = 5
_FIRST_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 3.0


class Isolation:
    """``publish`` stands in the place of Producer.produce; ``is_settled`` is asked before the next event."""

    def __init__(self, produce: Callable[..., None], count_failure: Callable[[str, str], None]) -> None:
        self._produce = produce
        self._count_failure = count_failure
        #: how many events were refused
        self.refused = 0
        #: what is to be done about the event at hand, if it was
        self.refusal: CdcOutboxError | None = None
        #: topic, value, key, partition, timestamp, headers
        self._event: tuple[str, bytes | None, bytes, int, int, Any] = ("", None, b"", 0, 0, [])
        self._on_delivery: Callable[[None, None], None]
        self._is_waiting = False
        self._unexpected = 0
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        #: when it is sent again, monotonic seconds; infinity while a report is to come
        self._again_at = float("inf")

    def publish(
        self,
        topic: str,
        value: bytes | None,
        key: bytes,
        partition: int,
        on_delivery: Callable[[None, None], None],
        _: None,
        timestamp_ms: int,
        headers: Any,
    ) -> None:
        self._event = (topic, value, key, partition, timestamp_ms, headers)
        self._on_delivery = on_delivery
        self._unexpected, self._pause_seconds, self.refusal = 0, _FIRST_PAUSE_SECONDS, None
        self._is_waiting = True
        try:
            self._send()
        except BaseException:
            self._is_waiting = False
            raise

    def is_settled(self) -> bool:
        """Whether the event at hand was acknowledged, or ``refusal`` says why not. Sends it again when that is due."""
        if self._is_waiting and time.monotonic() >= self._again_at:
            self._again_at = float("inf")
            try:
                self._send()
            except KafkaException as error:
                self._on_report(error.args[0], None)
            except BufferError:
                self._again_at = time.monotonic()
        return not self._is_waiting

    def _send(self) -> None:
        topic, value, key, partition, timestamp_ms, headers = self._event
        # The callback is made here: kept, it would hold this, and the producer with its threads, for the collector.
        self._produce(topic, value, key, partition, self._on_report, None, timestamp_ms, headers)

    def _on_report(self, error: KafkaError | None, _message: object) -> None:
        if error is None:
            self._is_waiting = False
            self._on_delivery(None, None)
            return
        topic, verdict = self._event[0], verdict_on(error)
        self._count_failure(topic, error.name())
        self._unexpected += verdict is Verdict.UNEXPECTED
        if verdict not in (Verdict.PASSING, Verdict.UNEXPECTED) or self._unexpected == _TRIES:
            self._is_waiting, self.refusal = False, explain(error, topic, alone=True)
            self.refused += 1
            return
        self._again_at = time.monotonic() + self._pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
