"""Metrics: their names and types are a contract; alert rules and dashboards depend on them.

The relay's thread writes, the HTTP thread reads. Nothing here is called per event: batches report.
"""

import bisect
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector

from cdc_outbox import __version__
from cdc_outbox.postgres.slots import Slot
from cdc_outbox.relay.watermark import Batch
from cdc_outbox.service.phases import STATES

if TYPE_CHECKING:
    from cdc_outbox.relay.policy.gate import Gates, Ruling

#: As pg_replication_slots has it: fine, more than max_wal_size is kept, about to be lost, lost.
WAL_STATUSES: Final = ("reserved", "extended", "unreserved", "lost")

_BUCKETS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


disable_created_metrics()  # type: ignore[no-untyped-call] # a second series beside every counter


class _CommitToAck(Collector):
    """A histogram that takes many equal observations at once, which prometheus_client's own does not."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BUCKETS) + 1)
        self._sum_seconds = 0.0

    def observe(self, seconds: float, events: int) -> None:
        self._counts[bisect.bisect_left(_BUCKETS, seconds)] += events
        self._sum_seconds += seconds * events

    def collect(self) -> Iterator[HistogramMetricFamily]:
        buckets, total = [], 0
        for bound, count in zip((*_BUCKETS, math.inf), list(self._counts), strict=True):
            total += count
            buckets.append(("+Inf" if math.isinf(bound) else str(bound), float(total)))
        family = HistogramMetricFamily(
            "cdc_outbox_commit_to_ack_seconds",
            "From the transaction's commit to Kafka's acknowledgement; a batch counts from its oldest commit",
        )
        family.add_metric([], buckets, self._sum_seconds)
        yield family


class Metrics:
    def __init__(self, *, canary_topic: str = "") -> None:
        self._canary_topic = canary_topic
        #: commit of the last canary that arrived, or when the first was expected; Unix seconds, NaN if none is
        self._canary_seen_at = math.nan
        self.registry = CollectorRegistry()
        self.events_published = self._counter("events_published", "Events acknowledged by Kafka", ["topic"])
        self.events_in_flight = self._gauge("events_in_flight", "Events published and not yet acknowledged")
        self.publish_failures = self._counter(
            "publish_failures", "Events that Kafka refused, by reason", ["topic", "reason"]
        )
        self.dead_letters = self._counter("dead_letters", "Events kept as dead letters", ["topic", "reason"])
        self._verdicts = self._counter(
            "policy_verdicts",
            "Events not simply allowed, or only watched; no rule: the default",
            ["verdict", "rule"],
        )
        self._policy_errors = self._counter("policy_errors", "Events for which a rule could not be evaluated", ["rule"])
        self.requests_refused = self._counter(
            "requests_refused", "Requests that the relay could not carry out", ["kind"]
        )
        self._policy_info = self._gauge("policy_info", "1 for the policy in force", ("sha256",))
        self.reconnects = self._counter("reconnects", "Times a side was lost and connected to again", ["side"])
        self.slot_lag_bytes = self._gauge("slot_lag_bytes", "Server's WAL end minus the slot's confirmed LSN")
        self.slot_retained_bytes = self._gauge("slot_retained_bytes", "WAL the server keeps because of the slot")
        self.slot_safe_bytes = self._gauge(
            "slot_safe_bytes", "WAL that may be written before the slot is lost; +Inf if the server sets no limit"
        )
        self._slot_wal_status = Gauge(
            "cdc_outbox_slot_wal_status", "1 for the slot's wal_status", ["status"], registry=self.registry
        )
        for gauge in (self.slot_lag_bytes, self.slot_retained_bytes, self.slot_safe_bytes):
            gauge.set(math.nan)  # not known yet
        self._state = Gauge("cdc_outbox_state", "1 for the state the relay is in", ["state"], registry=self.registry)
        self._commit_to_ack = _CommitToAck()
        self.registry.register(self._commit_to_ack)
        for side in ("postgres", "kafka"):
            self.reconnects.labels(side)
        self._oldest_commit_time_ms = 0
        self._gauge("oldest_unconfirmed_seconds", "Age of the oldest commit that is not settled").set_function(
            self.oldest_unconfirmed_seconds
        )
        self._gauge(
            "canary_age_seconds", "Age of the last canary that arrived; NaN where none is planted"
        ).set_function(lambda: time.time() - self._canary_seen_at)
        Info("cdc_outbox_build", "Version", registry=self.registry).info({"version": __version__})

    def batch_settled(self, batch: Batch) -> None:
        for topic, count in batch.per_topic.items():
            self.events_published.labels(topic).inc(count)
        if self._canary_topic in batch.per_topic:
            self._canary_seen_at = batch.first_commit_time_ms / 1000
        if batch.events:
            self._commit_to_ack.observe(max(0.0, time.time() - batch.first_commit_time_ms / 1000), batch.events)

    def publish_failed(self, topic: str, reason: str) -> None:
        self.publish_failures.labels(topic, reason).inc()

    def watch_oldest(self, commit_time_ms: int) -> None:
        """Unix milliseconds of the oldest unsettled commit, 0 if everything is settled."""
        self._oldest_commit_time_ms = commit_time_ms

    def oldest_unconfirmed_seconds(self) -> float:
        oldest = self._oldest_commit_time_ms
        return max(0.0, time.time() - oldest / 1000) if oldest else 0.0

    def expect_canary(self, *, expected: bool) -> None:
        """Whether canaries are planted by this relay, and so must arrive."""
        if not expected:
            self._canary_seen_at = math.nan
        elif math.isnan(self._canary_seen_at):
            self._canary_seen_at = time.time()

    def judged(self, ruling: "Ruling") -> None:
        self._verdicts.labels(ruling.action.verdict, ruling.rule).inc()
        if ruling.is_error:
            self._policy_errors.labels(ruling.rule).inc()

    def watched(self, gates: "Gates") -> None:
        """Count what rules in mode watch have seen since the last time."""
        for rule, count in gates.watched.items():
            if count:
                self._verdicts.labels("watch", rule).inc(count)
                gates.watched[rule] = 0
        for rule, count in gates.watch_errors.items():
            if count:
                self._policy_errors.labels(rule).inc(count)
                gates.watch_errors[rule] = 0

    def policy_in_force(self, sha256: bytes | None) -> None:
        self._policy_info.clear()
        if sha256:
            self._policy_info.labels(sha256.hex()).set(1)

    def slot_seen(self, slot: Slot | None) -> None:
        safe: float | None
        lag, retained, safe = (slot.lag_bytes, slot.retained_bytes, slot.safe_bytes) if slot else (None, None, None)
        self.slot_lag_bytes.set(math.nan if lag is None else lag)
        self.slot_retained_bytes.set(math.nan if retained is None else retained)
        if slot and safe is None:
            safe = 0 if slot.wal_status == "lost" else math.inf
        self.slot_safe_bytes.set(math.nan if safe is None else safe)
        for status in WAL_STATUSES:
            self._slot_wal_status.labels(status).set(slot is not None and slot.wal_status == status)

    def set_state(self, state: str) -> None:
        for name in STATES:
            self._state.labels(name).set(name == state)

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(f"cdc_outbox_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"cdc_outbox_{name}", text, labels, registry=self.registry)
