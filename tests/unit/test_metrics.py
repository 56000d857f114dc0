import math
import time

from cdc_outbox.postgres.slots import Slot
from cdc_outbox.relay.watermark import Batch
from cdc_outbox.service.health import Health
from cdc_outbox.service.metrics import Metrics
from cdc_outbox.service.phases import Phase
from cdc_outbox.wal.lsn import LSN

#: What others' alert rules and dashboards depend on.
CONTRACT = {
    "cdc_outbox_policy_errors": "counter",
    "cdc_outbox_policy_info": "gauge",
    "cdc_outbox_policy_verdicts": "counter",
    "cdc_outbox_requests_refused": "counter",
    "cdc_outbox_events_published": "counter",
    "cdc_outbox_events_in_flight": "gauge",
    "cdc_outbox_commit_to_ack_seconds": "histogram",
    "cdc_outbox_oldest_unconfirmed_seconds": "gauge",
    "cdc_outbox_slot_lag_bytes": "gauge",
    "cdc_outbox_slot_retained_bytes": "gauge",
    "cdc_outbox_slot_safe_bytes": "gauge",
    "cdc_outbox_publish_failures": "counter",
    "cdc_outbox_dead_letters": "counter",
    "cdc_outbox_reconnects": "counter",
    "cdc_outbox_slot_wal_status": "gauge",
    "cdc_outbox_canary_age_seconds": "gauge",
    "cdc_outbox_state": "gauge",
    "cdc_outbox_build": "info",
}


def slot(safe_bytes: int | None, wal_status: str = "reserved") -> Slot:
    return Slot("s", "pgoutput", "d", 1, LSN(1), wal_status, None, 10, 20, safe_bytes, temporary=False, two_phase=False)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_names_and_types_are_those_of_the_contract() -> None:
    families = list(Metrics().registry.collect())
    assert {family.name: family.type for family in families} == CONTRACT
    assert all(family.documentation for family in families)


def test_the_canary_s_age() -> None:
    metrics = Metrics(canary_topic="canary")
    batch = Batch(lambda *_: None)
    batch.first_commit_time_ms = int((time.time() - 5) * 1000)
    batch.per_topic["canary"] = 1

    def age() -> float:
        seconds = value(metrics, "cdc_outbox_canary_age_seconds")
        assert seconds is not None
        return seconds

    assert math.isnan(age())
    metrics.expect_canary(expected=True)
    assert 0 <= age() < 1
    metrics.batch_settled(batch)
    assert 5 <= age() < 6
    metrics.expect_canary(expected=True)
    assert 5 <= age() < 6
    metrics.expect_canary(expected=False)
    assert math.isnan(age())


def test_a_settled_batch() -> None:
    metrics = Metrics()
    batch = Batch(lambda *_: None)
    batch.first_commit_time_ms = int((time.time() - 3) * 1000)
    batch.per_topic.update({"a": 2, "b": 1})
    batch.events = 3
    metrics.batch_settled(batch)
    metrics.batch_settled(batch)
    assert value(metrics, "cdc_outbox_events_published_total", topic="a") == 4
    assert value(metrics, "cdc_outbox_commit_to_ack_seconds_count") == 6
    assert value(metrics, "cdc_outbox_commit_to_ack_seconds_bucket", le="2.0") == 0
    assert value(metrics, "cdc_outbox_commit_to_ack_seconds_bucket", le="5.0") == 6
    assert 18 <= (value(metrics, "cdc_outbox_commit_to_ack_seconds_sum") or 0) < 24


def test_slot_figures() -> None:
    metrics = Metrics()
    assert math.isnan(value(metrics, "cdc_outbox_slot_lag_bytes") or 0)
    metrics.slot_seen(slot(30))
    assert value(metrics, "cdc_outbox_slot_lag_bytes") == 10
    assert value(metrics, "cdc_outbox_slot_retained_bytes") == 20
    assert value(metrics, "cdc_outbox_slot_safe_bytes") == 30
    metrics.slot_seen(slot(None))
    assert value(metrics, "cdc_outbox_slot_safe_bytes") == math.inf
    assert value(metrics, "cdc_outbox_slot_wal_status", status="reserved") == 1
    metrics.slot_seen(slot(None, "lost"))
    assert value(metrics, "cdc_outbox_slot_safe_bytes") == 0
    assert value(metrics, "cdc_outbox_slot_wal_status", status="lost") == 1
    assert value(metrics, "cdc_outbox_slot_wal_status", status="reserved") == 0
    metrics.slot_seen(None)
    assert math.isnan(value(metrics, "cdc_outbox_slot_safe_bytes") or 0)
    assert value(metrics, "cdc_outbox_slot_wal_status", status="lost") == 0


def test_the_state_is_one_of_five() -> None:
    metrics = Metrics()
    health = Health("s", metrics)
    for phase, state in STATE_OF.items():
        health.become(phase, "because")
        shown = {name: value(metrics, "cdc_outbox_state", state=name) for name in CONTRACT_STATES}
        assert shown == {name: float(name == state) for name in CONTRACT_STATES}
        assert health.ready == (state == "streaming")
        report = health.report()
        assert (report["state"], report["phase"], report["reason"]) == (state, phase.label, "because")
    assert set(STATE_OF) == set(Phase)


STATE_OF = {
    Phase.CONNECTING: "starting",
    Phase.STANDBY: "standby",
    Phase.READING: "streaming",
    Phase.ISOLATING: "streaming",
    Phase.DRAINING: "streaming",
    Phase.STALLED: "waiting",
    Phase.BACKOFF: "waiting",
    Phase.HALTED: "halted",
}
CONTRACT_STATES = ("starting", "streaming", "standby", "waiting", "halted")


def test_the_oldest_unconfirmed_commit_ages() -> None:
    metrics = Metrics()
    assert value(metrics, "cdc_outbox_oldest_unconfirmed_seconds") == 0
    metrics.watch_oldest(int((time.time() - 5) * 1000))
    assert 5 <= (value(metrics, "cdc_outbox_oldest_unconfirmed_seconds") or 0) < 10
