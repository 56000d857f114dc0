"""The relay killed, stopped, frozen and doubled while events flow."""

import os
import random
import signal
import time
from typing import Any

import pytest

from fault.stage import Incident, Stage
from support.waiting import wait_until

#: In transactions of 100, by the server itself: what a drain at full speed works off.
BACKLOG = """
DO $$ BEGIN FOR i IN 1..1500 LOOP
    INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload)
    SELECT '{type}', 'a-' || (i + j) % 50, 'Tested', '{{"filler": "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}}'
      FROM generate_series(1, 100) j;
    COMMIT;
END LOOP; END $$
"""


def test_killed_at_500_events_a_second(stage: Stage) -> None:
    rng = random.Random(1)
    stage.start_relay()
    stage.start_writer(seed=1)
    for _ in range(6):
        stage.wait_for_events(rng.randint(200, 800))
        with stage.incident():
            stage.kill(stage.relays[0])
            stage.start_relay()
    stage.close("relay killed, 500 events/s", max_duplicates=50)


def test_killed_at_full_speed(stage: Stage) -> None:
    rng = random.Random(2)
    stage.world.db.execute(BACKLOG.format(type=stage.aggregate_types[0]).encode())
    for _ in range(4):
        relay = stage.start_relay()
        time.sleep(rng.uniform(0.05, 0.3))  # a random moment is what is asked for
        stage.incidents.append(Incident(time.time(), None, 0))
        stage.kill(relay)
    stage.start_relay()
    stage.close("relay killed, full speed", max_duplicates=10_000)


def test_killed_between_kafkas_append_and_its_acknowledgement(stage: Stage) -> None:
    stage.start_relay()
    stage.start_writer(seed=3)
    for _ in range(3):
        stage.wait_for_events(300)
        with stage.incident():
            stage.servers.kafka_proxy.swallow_answers()
            stage.wait_for_events(300)
            stage.kill(stage.relays[0])
            stage.servers.kafka_proxy.restore()
            stage.start_relay()
    stage.close("relay killed, acknowledgements on their way")


def test_killed_inside_a_large_transaction(stage: Stage) -> None:
    insert = "INSERT INTO outbox (aggregate_type, aggregate_id, event_type) SELECT %s, 'a-' || j %% 50, 'x'"
    stage.world.db.execute(f"{insert} FROM generate_series(1, 100000) j".encode(), [stage.aggregate_types[0]])
    for _ in range(3):
        relay = stage.start_relay()
        wait_until(lambda relay=relay: relay.metric("cdc_outbox_events_in_flight"), "it is being published")  # type: ignore[misc]
        stage.incidents.append(Incident(time.time(), None, 0))
        stage.kill(relay)
    stage.start_relay()
    stage.close("relay killed, inside a transaction of 100,000")


def test_stopped_cleanly_under_load(stage: Stage) -> None:
    rng = random.Random(4)
    stage.start_relay()
    stage.start_writer(seed=4, events_per_second=2000)
    for _ in range(5):
        stage.wait_for_events(rng.randint(500, 2000))
        with stage.incident():
            assert stage.stop(stage.relays[0]) == 0
            stage.start_relay()
    verdict = stage.close("relay stopped cleanly", max_duplicates=0)
    assert verdict.duplicates == []


def test_stopped_while_the_broker_is_away(stage: Stage) -> None:
    relay = stage.start_relay(CDC_OUTBOX_SERVICE__SHUTDOWN_TIMEOUT_SECONDS="3")
    stage.start_writer(seed=5)
    stage.wait_for_events(200)
    with stage.incident():
        stage.servers.kafka_proxy.refuse()
        stage.wait_for_events(300)
        asked = time.monotonic()
        assert stage.stop(relay) == 0
        assert time.monotonic() - asked < 6, "within the deadline"
        stage.servers.kafka_proxy.restore()
        stage.start_relay()
    stage.close("relay stopped while the broker is away")


def test_frozen_for_a_moment(stage: Stage) -> None:
    """Shorter than wal_sender_timeout: nobody takes over, nothing is resent."""
    leader = stage.start_relay()
    standby = stage.start_relay(wait=False)
    wait_until(lambda: (standby.readyz() or {}).get("state") == "standby", "one stands by")
    stage.start_writer(seed=6)
    stage.wait_for_events(300)
    with stage.incident():
        os.kill(leader.process.pid, signal.SIGSTOP)
        stage.wait_for_events(1500)
        os.kill(leader.process.pid, signal.SIGCONT)
    assert (leader.readyz() or {})["state"] == "streaming"
    stage.close("relay frozen 3 s, a standby waiting", max_duplicates=0)


def test_frozen_for_long(stage: Stage) -> None:
    """Longer than wal_sender_timeout: the standby takes over; what wakes up later does no harm."""
    leader = stage.start_relay()
    standby = stage.start_relay(wait=False)
    wait_until(lambda: (standby.readyz() or {}).get("state") == "standby", "one stands by")
    stage.start_writer(seed=7)
    stage.wait_for_events(300)
    began = time.time()
    os.kill(leader.process.pid, signal.SIGSTOP)
    wait_until(lambda: (standby.readyz() or {}).get("ready"), "it takes over", timeout_seconds=20)
    stage.incidents.append(Incident(began, None, time.time() - began))
    stage.wait_for_events(300)
    os.kill(leader.process.pid, signal.SIGCONT)
    stage.wait_for_events(500)
    wait_until(lambda: (leader.readyz() or {}).get("state") == "standby", "the former leader stands by")
    stage.close("relay frozen, the standby takes over", recovers_within_seconds=12)


def test_two_relays(stage: Stage) -> None:
    stage.start_relay()
    stage.start_relay(wait=False)
    stage.start_writer(seed=8)
    for _ in range(4):
        stage.wait_for_events(400)
        leader = next(relay for relay in stage.relays if (relay.readyz() or {}).get("ready"))
        with stage.incident():
            stage.kill(leader)
        stage.start_relay(wait=False)
    stage.close("leader killed, a standby takes over", max_duplicates=50)


@pytest.mark.parametrize("kind", ["too large for the topic", "too large for the client"])
def test_poison_under_load(stage: Stage, kind: str) -> None:
    """Dead letters are the poison, the whole poison and nothing but the poison; crashes change nothing about that."""
    settings: dict[str, Any] = (
        {"CDC_OUTBOX_KAFKA__PRODUCER__MESSAGE_MAX_BYTES": "17000"} if kind.endswith("client") else {}
    )
    stage.start_relay(**settings)
    writer = stage.start_writer(seed=9, poison_share=0.004)
    for _ in range(3):
        stage.wait_for_events(700)
        with stage.incident():
            stage.kill(stage.relays[0])
            stage.start_relay(**settings)
    stage.close(f"poison, {kind}, and relay killed")
    committed = {event.id for event in writer.ledger.committed}
    assert set(stage.dead_letters()) == writer.ledger.poison & committed != set()
