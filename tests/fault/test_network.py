"""The network between the relay and either side: everything a proxy can do to a connection."""

from collections.abc import Callable

import pytest

from fault.proxy import Proxy
from fault.stage import Stage
from support.waiting import wait_until

#: Each leaves the proxy as it wants it; what must be noticed before it ends is so marked.
MODES: dict[str, Callable[[Proxy], None]] = {
    "refuses": Proxy.refuse,
    "falls silent": Proxy.fall_silent,
    "swallows answers": Proxy.swallow_answers,
    "delays by 0.2 s": lambda proxy: proxy.delay(0.2),
    "trickles": Proxy.trickle,
    "cuts after 5,000 bytes to us": lambda proxy: proxy.cut_after(5_000, towards="client"),
    "cuts after 3,000 bytes from us": lambda proxy: proxy.cut_after(3_000, towards="server"),
}
NOTICED = ("refuses", "falls silent", "swallows answers")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", ["postgres", "kafka"])
def test_network(stage: Stage, side: str, mode: str) -> None:
    proxy = stage.servers.postgres_proxy if side == "postgres" else stage.servers.kafka_proxy
    stage.start_relay()
    stage.start_writer(seed=60)
    stage.wait_for_events(300)
    with stage.incident():
        MODES[mode](proxy)
        if mode.startswith("cuts"):
            proxy.reset()  # what is connected now has passed that many bytes long ago
        if mode in NOTICED:
            wait_until(lambda: not stage.observer.is_ready, "it is noticed", timeout_seconds=12)
        stage.wait_for_events(800)
        proxy.restore()
    stage.close(f"network to {side} {mode}", detects_within_seconds=10 if mode in NOTICED else None)


@pytest.mark.parametrize("side", ["postgres", "kafka"])
def test_resets_in_the_middle_of_messages(stage: Stage, side: str) -> None:
    proxy = stage.servers.postgres_proxy if side == "postgres" else stage.servers.kafka_proxy
    stage.start_relay()
    stage.start_writer(seed=61, events_per_second=3000)
    with stage.incident():
        for _ in range(12):
            stage.wait_for_events(250)
            proxy.reset()
    stage.close(f"network to {side} resets, 12 times")


@pytest.mark.parametrize("side", ["postgres", "kafka"])
def test_connections_that_are_forgotten(stage: Stage, side: str) -> None:
    """Nobody ever says that they are dead, and new ones work: the relay must find out by itself."""
    proxy = stage.servers.postgres_proxy if side == "postgres" else stage.servers.kafka_proxy
    stage.start_relay()
    stage.start_writer(seed=62)
    stage.wait_for_events(300)
    with stage.incident():
        proxy.forget_connections()
        wait_until(lambda: not stage.observer.is_ready, "it is noticed", timeout_seconds=12)
    stage.close(f"connections to {side} forgotten", detects_within_seconds=10, recovers_within_seconds=12)


def test_a_row_that_cannot_be_decoded(stage: Stage) -> None:
    """A value of a kind that pgoutput does not know, as a faulty peer would send it: kept whole, the rest flows."""
    stage.world.insert(stage.aggregate_types[0])
    mark = "undecodable-mark"
    length = len(mark).to_bytes(4, "big")
    stage.servers.postgres_proxy.alter(b"t" + length + mark.encode(), b"?" + length + mark.encode())
    stage.start_relay()
    stage.world.db.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, event_type) VALUES (%s, 'a-1', %s)",
        [stage.aggregate_types[0], mark],
    )
    after = stage.world.insert(stage.aggregate_types[0])
    stage.world.wait_until_confirmed()
    assert [record.event_id for record in stage.records()][-1] == after
    query = "SELECT reason, event_id, payload, detail FROM cdc_outbox.parked"
    (letter,) = stage.world.db.execute(query).fetchall()
    assert letter[:2] == ("undecodable", None)
    assert mark.encode() in letter[2]
    assert "column event_type has a value of unknown kind" in letter[3]
