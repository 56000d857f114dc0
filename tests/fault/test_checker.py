"""The checker itself: small evidence by hand, then relays that really break a promise, each of which it must catch."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cdc_outbox.demo.relay import RelayProcess
from fault import broken_relay
from fault.checker import Evidence, Record, Verdict, duplicates_between, judge
from fault.stage import Stage
from fault.writer import Event

A1, A2, B1 = (Event(f"{name}{version}", "t", name, version) for name, version in (("a", 1), ("a", 2), ("b", 1)))


def record(event: Event, appended_at: float, *, redriven: bool = False) -> Record:
    return Record(event.id, ("outbox.t", event.aggregate_id), appended_at, redriven)


GOOD = Evidence(
    committed=[A1, A2, B1],
    records=[record(A1, 1.0), record(A2, 2.0)],
    dead_letters={"b1": 3.0},
    end_lsns={"a1": 10, "a2": 20, "b1": 30},
    confirmed=[(1.5, 10), (1.9, 19), (2.5, 20), (3.5, 99)],
)


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert judge(GOOD).broken_promises() == []
    again = replace(GOOD, records=[*GOOD.records, record(B1, 9.0, redriven=True)])
    assert judge(again) == judge(GOOD), "a redrive is neither a duplicate nor out of order"


@pytest.mark.parametrize(
    ("change", "promise"),
    [
        ({"records": [record(A1, 1.0)]}, "I1"),
        ({"dead_letters": {}}, "I1"),
        ({"committed": [A1, A2]}, "I2"),
        ({"records": [record(A2, 1.0), record(A1, 1.0)]}, "I3"),
        ({"confirmed": [(2.9, 30)]}, "I5"),
        ({"confirmed": [(1.9, 20)]}, "I5"),
    ],
)
def test_each_promise(change: dict[str, Any], promise: str) -> None:
    first, *_ = judge(replace(GOOD, **change)).broken_promises()
    assert first.startswith(promise)


def test_duplicates_are_counted_by_incident() -> None:
    records = [record(A1, 1.0), record(A2, 2.0), record(A1, 5.0), record(A2, 6.0), record(A1, 9.0)]
    verdict = judge(replace(GOOD, records=records))
    assert verdict.broken_promises() == [], "a repeated suffix reorders no first appearance"
    assert duplicates_between(verdict, [4.0, 8.0]) == [2, 1]


def play(stage: Stage, how: str) -> Verdict:
    """Events through a broken relay and a slow network, and two clean stops."""

    class BrokenRelay(RelayProcess):
        program = (sys.executable, "-m", "fault.broken_relay", how)

    stage.relay_class = BrokenRelay
    stage.servers.kafka_proxy.delay(0.05)
    python_path = str(Path(__file__).parents[1])
    stage.start_relay(PYTHONPATH=python_path)
    stage.start_writer(seed=70, events_per_second=1000)
    for _ in range(2):
        stage.wait_for_events(1000)
        stage.stop(stage.relays[0])
        stage.start_relay(PYTHONPATH=python_path)
    stage.wait_for_events(1000)
    assert stage.writer
    stage.writer.stop()
    stage.world.wait_until_confirmed()
    return stage.verdict()


@pytest.mark.parametrize(
    ("how", "promise"),
    [
        (broken_relay.confirms_too_early, "I5"),
        (broken_relay.drops_a_row, "I1"),
        (broken_relay.swaps_two_events_of_a_key, "I3"),
    ],
)
def test_a_relay_that_breaks_a_promise_is_caught(stage: Stage, how: Callable[[], None], promise: str) -> None:
    verdict = play(stage, how.__name__)
    assert promise in {found[:2] for found in verdict.broken_promises()}


def test_a_relay_that_confirms_a_rows_lsn_is_caught(stage: Stage) -> None:
    """Its clean stops are none: what it confirmed was not the end of anything, and it comes again."""
    verdict = play(stage, broken_relay.confirms_a_rows_lsn.__name__)
    assert verdict.broken_promises() == []
    assert verdict.duplicates, "the bound after a clean stop is none"
