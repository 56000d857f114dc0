"""The ledger: what was committed, what was rolled back, what a consumer saw, and the verdict on the three.

Pure bookkeeping. Writers and reader append from their threads; the verdict is asked for when they have ended.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

_LATENCIES_KEPT: Final = 2_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """Counts of events."""

    committed: int
    rolled_back: int
    delivered: int
    lost: int
    phantom: int
    out_of_order: int
    kills: int
    """Of relay and consumer, on the way."""
    duplicates: int
    """Of deliveries: a crash resends what was in flight."""
    effects: int
    """What the consumer did, in its own database."""
    effects_missing: int
    effects_doubled: int
    effects_out_of_order: int

    @property
    def is_delivered(self) -> bool:
        """Every committed event, in order, and no other."""
        return self.committed > 0 and not (self.lost or self.phantom or self.out_of_order)

    @property
    def is_acted_on_once(self) -> bool:
        """Effects = committed events."""
        return self.effects == self.committed and not (
            self.effects_missing or self.effects_doubled or self.effects_out_of_order
        )

    @property
    def good(self) -> bool:
        return self.is_delivered and self.is_acted_on_once


@dataclass(slots=True)
class Ledger:
    #: per aggregate the ids in commit order; one aggregate has one writer
    committed: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    rolled_back: list[str] = field(default_factory=list)
    #: per aggregate the ids in the order in which they were first seen
    seen: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    duplicates: int = 0
    kills: int = 0
    #: per aggregate the ids in the order in which the consumer acted on them
    effects: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    #: of the latest events, just before INSERT until seen by the consumer
    latencies_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES_KEPT))
    committed_count: int = 0
    delivered_count: int = 0
    _seen_ids: set[str] = field(default_factory=set)

    def commit(self, events: list[tuple[str, str]]) -> None:
        """``events``: (aggregate, id) in the order of the transaction."""
        for aggregate, event_id in events:
            self.committed[aggregate].append(event_id)
        self.committed_count += len(events)

    def see(self, aggregate: str, event_id: str, latency_seconds: float) -> None:
        if event_id in self._seen_ids:
            self.duplicates += 1
            return
        self._seen_ids.add(event_id)
        self.seen[aggregate].append(event_id)
        self.delivered_count += 1
        self.latencies_seconds.append(latency_seconds)

    def take_effects(self, effects: Iterable[tuple[str, str]]) -> None:
        """``effects``: (aggregate, id) in the order in which they came about."""
        for aggregate, event_id in effects:
            self.effects[aggregate].append(event_id)

    def percentiles_seconds(self) -> tuple[float, float] | None:
        """p50 and p99 of the latest latencies."""
        latest = sorted(self.latencies_seconds)
        if not latest:
            return None
        return latest[len(latest) // 2], latest[int(len(latest) * 0.99)]

    def verdict(self) -> Verdict:
        acted_on = Counter(event_id for ids in self.effects.values() for event_id in ids)
        committed_ids = {event_id for ids in self.committed.values() for event_id in ids}
        return Verdict(
            committed=len(committed_ids),
            rolled_back=len(self.rolled_back),
            delivered=len(self._seen_ids),
            lost=len(committed_ids - self._seen_ids),
            phantom=len(self._seen_ids - committed_ids),
            out_of_order=sum(self._out_of_order(aggregate, ids) for aggregate, ids in self.seen.items()),
            kills=self.kills,
            duplicates=self.duplicates,
            effects=acted_on.total(),
            effects_missing=len(committed_ids - acted_on.keys()),
            effects_doubled=sum(count - 1 for count in acted_on.values()),
            effects_out_of_order=sum(self._out_of_order(aggregate, ids) for aggregate, ids in self.effects.items()),
        )

    def _out_of_order(self, aggregate: str, seen: list[str]) -> int:
        """Events of the aggregate that came after a later one."""
        place = {event_id: position for position, event_id in enumerate(self.committed[aggregate])}
        latest, count = -1, 0
        for event_id in seen:
            position = place.get(event_id, latest)
            count += position < latest
            latest = max(latest, position)
        return count
