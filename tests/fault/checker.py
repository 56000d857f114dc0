"""The offline checker: from what was written, what Kafka and the dead letters hold, and what the slot said meanwhile,
to a verdict on the promises. Pure; every scenario is judged by it, and it is itself tried on relays that break them.

I1  no loss: committed = Kafka and dead letters together
I2  no phantom: nothing that was not committed
I3  order: first appearances of an aggregate's events in the order of their commits
I4  duplicates, counted
I5  no sample of the slot's confirmed LSN passes the end of a transaction with an event unsettled at that moment
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fault.writer import Event


@dataclass(frozen=True, slots=True)
class Record:
    """Of Kafka, in the order of its partition. ``appended_at`` is the broker's clock, Unix seconds."""

    event_id: str
    aggregate: tuple[str, str]
    appended_at: float
    redriven: bool = False


@dataclass(slots=True)
class Evidence:
    committed: Sequence[Event] = ()
    records: Sequence[Record] = ()
    #: event id -> when it was kept, Unix seconds
    dead_letters: Mapping[str, float] = field(default_factory=dict)
    #: event id -> end of its transaction, as PostgreSQL itself tells
    end_lsns: Mapping[str, int] = field(default_factory=dict)
    #: (just after it was asked for, Unix seconds; confirmed_flush_lsn)
    confirmed: Sequence[tuple[float, int]] = ()


@dataclass(slots=True)
class Verdict:
    events: int
    lost: list[str]
    phantoms: list[str]
    reordered: list[str]
    #: when each duplicate was appended
    duplicates: list[float]
    #: samples of the slot that came before a settlement, each in words
    confirmed_early: list[str]

    def broken_promises(self) -> list[str]:
        found = {
            "I1 lost": self.lost,
            "I2 phantom": self.phantoms,
            "I3 reordered": self.reordered,
            "I5 confirmed too early": self.confirmed_early,
        }
        return [f"{name}: {len(these)}, e.g. {these[:3]}" for name, these in found.items() if these]


def judge(evidence: Evidence) -> Verdict:
    committed = {event.id: event for event in evidence.committed}
    settled = dict(evidence.dead_letters)
    first: list[Record] = []
    duplicates: list[float] = []
    for record in evidence.records:
        if record.event_id in settled and settled[record.event_id] <= record.appended_at and not record.redriven:
            duplicates.append(record.appended_at)
        elif not record.redriven:
            first.append(record)
        settled[record.event_id] = min(settled.get(record.event_id, record.appended_at), record.appended_at)
    return Verdict(
        events=len(committed),
        lost=[event_id for event_id in committed if event_id not in settled],
        phantoms=[event_id for event_id in settled if event_id not in committed],
        reordered=_reordered(first, committed),
        duplicates=duplicates,
        confirmed_early=_confirmed_early(evidence, settled),
    )


def _reordered(first: Sequence[Record], committed: Mapping[str, Event]) -> list[str]:
    """Events that first appear after a later one of their aggregate."""
    latest: defaultdict[tuple[str, str], int] = defaultdict(int)
    found = []
    for record in first:
        event = committed.get(record.event_id)
        if event is None:
            continue
        if event.version < latest[record.aggregate]:
            found.append(record.event_id)
        latest[record.aggregate] = max(latest[record.aggregate], event.version)
    return found


def _confirmed_early(evidence: Evidence, settled: Mapping[str, float]) -> list[str]:
    never = float("inf")
    by_end = sorted((lsn, settled.get(event_id, never), event_id) for event_id, lsn in evidence.end_lsns.items())
    ends = [lsn for lsn, _, _ in by_end]
    latest, worst = [], (0.0, "")
    for _, at, event_id in by_end:
        worst = max(worst, (at, event_id))
        latest.append(worst)
    found = []
    for sampled_at, confirmed in evidence.confirmed:
        place = bisect_right(ends, confirmed) - 1
        if place >= 0 and latest[place][0] > sampled_at:
            found.append(f"{latest[place][1]} settled {latest[place][0] - sampled_at:.3f} s after")
    return found


def duplicates_between(verdict: Verdict, moments: Sequence[float]) -> list[int]:
    """Duplicates by the incident they followed; ``moments`` are the beginnings of the incidents, ascending."""
    counts = Counter(max(0, bisect_right(moments, at) - 1) for at in verdict.duplicates)
    return [counts[number] for number in range(len(moments))]
