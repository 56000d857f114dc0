"""A drain: a backlog is written, then one peer works it off; what arrived, how fast, and what it cost."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.accounting import Account
from benchmarks.arena import Arena
from benchmarks.lane import Backlog, Found, Lane, open_lane
from benchmarks.peers import Peer


class Incomplete(Exception):
    """Something is missing or out of order: there is no figure to report."""


@dataclass(frozen=True, slots=True)
class Drained:
    """Of one drain; the clock runs from the slot being taken (or the first record) to the last record."""

    peer: str
    events: int
    seconds: float
    relay_us: float
    walsender_us: float | None
    broker_us: float | None
    peak_rss_mb: float
    duplicates: int

    @property
    def events_per_second(self) -> float:
        return self.events / max(self.seconds, 0.001)  # the clock is that of Kafka's timestamps

    @property
    def relay_per_walsender(self) -> float | None:
        return self.relay_us / self.walsender_us if self.walsender_us else None

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "events_per_second": self.events_per_second,
            "relay_per_walsender": self.relay_per_walsender,
        }


def drain(arena: Arena, peer: Peer, backlog: Backlog) -> Drained:
    """Raises Incomplete, `peers.Unavailable`."""
    with open_lane(arena) as lane:
        peer.prepare(lane)
        lane.write(backlog)
        with peer.start(lane) as process:
            find = {"relay": lambda: process.pid, "walsender": lane.walsender_pid, "broker": lambda: arena.broker_pid}
            with Account(**find) as account:
                begun_at, finished_at = _watch(lane, peer, process, backlog.events)
        found = lane.read(backlog.events) if peer.publishes else None
    if found and not found.is_complete:
        raise Incomplete(f"{peer.name}: {found.missing} missing, {found.out_of_order} out of order")
    return _reckon(peer, backlog, account, begun_at, finished_at, found)


def _watch(lane: Lane, peer: Peer, process: Any, events: int) -> tuple[float, float]:
    """When the work began and when it was seen to be done, Unix seconds."""
    begun_at = 0.0
    deadline = time.monotonic() + lane.arena.patience_seconds
    while not peer.has_finished(lane, process, events):
        if time.monotonic() > deadline:
            raise Incomplete(f"{peer.name}: not done after {lane.arena.patience_seconds:.0f} s")
        if process.poll() is not None:
            raise Incomplete(f"{peer.name} ended with {process.returncode}")
        if not begun_at and (lane.walsender_pid() if peer.uses_slot else lane.arrived()):
            begun_at = time.time()
        time.sleep(0.01)
    return begun_at, time.time()


def _reckon(
    peer: Peer, backlog: Backlog, account: Account, begun_at: float, finished_at: float, found: Found | None
) -> Drained:
    end = found.last_at if found else finished_at
    begin = min(begun_at, found.first_at) if found else begun_at

    def us_per_event(name: str) -> float | None:
        spent = account.cpu_seconds(name, begin, finished_at)
        return None if spent is None else spent / backlog.events * 1e6

    return Drained(
        peer=peer.name,
        events=backlog.events,
        seconds=end - begin,
        relay_us=us_per_event("relay") or 0.0,
        walsender_us=us_per_event("walsender") if peer.uses_slot else None,
        broker_us=us_per_event("broker") if peer.publishes else None,
        peak_rss_mb=account.peak_rss_bytes["relay"] / 1e6,
        duplicates=found.duplicates if found else 0,
    )
