"""The relay's other hours: its start, its idling, a huge transaction, a crash in the middle of a drain."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.accounting import cpu_seconds, peak_rss_bytes
from benchmarks.arena import Arena
from benchmarks.drain import Incomplete
from benchmarks.lane import Backlog, Lane, open_lane
from benchmarks.peers.relay import Relay


@dataclass(frozen=True, slots=True)
class Start:
    seconds: float
    """Process start to the broker's append of the first event."""


@dataclass(frozen=True, slots=True)
class Idle:
    seconds: float
    cpu_percent: float
    """Of one core."""
    wal_bytes: int
    lag_bytes: int
    """Of the slot, at the end."""


@dataclass(frozen=True, slots=True)
class Huge:
    events: int
    peak_rss_mb: float
    first_seconds: float
    """Slot taken to first record."""
    last_seconds: float


@dataclass(frozen=True, slots=True)
class Crash:
    events: int
    lost: int
    duplicates: int
    recovered_seconds: float
    """Start of the next relay to its first record."""


def measure_start(arena: Arena) -> Start:
    with open_lane(arena) as lane:
        lane.write(Backlog(1, 1))
        began = time.time()
        with Relay().start(lane):
            _wait(arena, lane.is_confirmed, "the first event")
        return Start(lane.read(1).first_at - began)


def measure_idle(arena: Arena, seconds: float) -> Idle:
    with open_lane(arena) as lane, Relay().start(lane) as process:
        _wait(arena, lambda: lane.walsender_pid() is not None, "the slot is taken")
        time.sleep(5)  # what a start costs is not idling
        spent, wal, began = cpu_seconds(process.pid) or 0.0, lane.wal_end(), time.monotonic()
        time.sleep(seconds)
        took = time.monotonic() - began
        percent = ((cpu_seconds(process.pid) or 0.0) - spent) / took * 100
        end = lane.wal_end()
        return Idle(round(took, 1), round(percent, 3), end - wal, _lag_bytes(lane))


def measure_huge(arena: Arena, events: int) -> Huge:
    with open_lane(arena) as lane:
        lane.write(Backlog(events, events))
        with Relay().start(lane) as process:
            _wait(arena, lambda: lane.walsender_pid() is not None, "the slot is taken")
            began = time.time()
            _wait(arena, lane.is_confirmed, "the huge transaction")
            peak = peak_rss_bytes(process.pid)
        found = lane.read(events)
        if not found.is_complete:
            raise Incomplete(f"huge: {found.missing} missing, {found.out_of_order} out of order")
        return Huge(events, peak / 1e6, found.first_at - began, found.last_at - began)


def measure_crash(arena: Arena, events: int) -> Crash:
    with open_lane(arena) as lane:
        lane.write(Backlog(events, 100))
        with Relay().start(lane) as process:
            _wait(arena, lambda: lane.arrived() > events // 3, "a third of the backlog")
            process.kill()
            process.wait()
        arrived, began = lane.arrived(), time.time()
        with Relay().start(lane):
            _wait(arena, lambda: lane.arrived() > arrived, "the next record")
            recovered = time.time() - began
            _wait(arena, lane.is_confirmed, "the rest")
        found = lane.read(events)
        if found.out_of_order:
            raise Incomplete(f"crash: {found.out_of_order} out of order")
        return Crash(events, found.missing, found.duplicates, recovered)


def _lag_bytes(lane: Lane) -> int:
    row = lane.db.execute(
        "SELECT (pg_current_wal_lsn() - confirmed_flush_lsn)::bigint FROM pg_replication_slots WHERE slot_name = %s",
        [lane.slot],
    ).fetchone()
    return int(row[0]) if row else -1


def _wait(arena: Arena, condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + arena.patience_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Incomplete(f"not within {arena.patience_seconds:.0f} s: {what}")
        time.sleep(0.01)
