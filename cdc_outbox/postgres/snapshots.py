"""Snapshots of the last while: in which of them is what had ended certain by now, and certain how?

*Ended*: all that was in progress in it has ended since. Then a later look at the catalogue shows what any transaction
of that time has done to it, even one whose COMMIT waited for a synchronous standby, which logical decoding does not.

*Counted*: the updates of its time are in PostgreSQL's statistics besides. A session reports them when its transaction
ends, at the latest ten seconds after (PGSTAT_IDLE_INTERVAL), unless it is in the next transaction by then.
Source: PostgreSQL manual, "The Cumulative Statistics System", "pg_locks" (virtualxid), "Transaction ID and Snapshot
Information Functions".
"""

from dataclasses import dataclass
from typing import Final

#: Only so long after a snapshot a session that is idle has reported what it did before.
COUNTED_SECONDS: Final = 11.0
#: And one that was not idle then, so long after the end of the transaction that it was in.
_REPORTED_SECONDS: Final = 1.0
_MOST_KEPT: Final = 100


@dataclass(slots=True)
class Snapshot:
    #: monotonic seconds
    at: float
    #: as PostgreSQL prints it
    text: str
    #: all below had ended
    xmin: int
    #: none from here on had begun
    xmax: int
    #: transactions that were open when others had reported, and still are; None before that
    reporting: frozenset[str] | None = None
    #: when the last of them was seen to be gone
    reported_at: float = float("inf")


class Snapshots:
    def __init__(self) -> None:
        self._kept: list[Snapshot] = []
        self.ended: Snapshot | None = None
        """The latest of which all has ended."""
        self.counted: Snapshot | None = None
        """The latest of which all is counted."""

    def add(self, taken: Snapshot, open_transactions: frozenset[str]) -> None:
        """``open_transactions``: the virtual transaction ids of all sessions but ours, when it was taken or after."""
        self._kept.append(taken)
        for kept in self._kept:
            if kept.at + COUNTED_SECONDS <= taken.at:
                kept.reporting = open_transactions & (open_transactions if kept.reporting is None else kept.reporting)
                if not kept.reporting:
                    kept.reported_at = min(kept.reported_at, taken.at)
        ended = [kept for kept in self._kept if kept.xmax <= taken.xmin]
        counted = [kept for kept in ended if kept.reported_at + _REPORTED_SECONDS <= taken.at]
        self.ended = ended[-1] if ended else None
        self.counted = counted[-1] if counted else None
        if self.counted:
            self._kept = self._kept[self._kept.index(self.counted) :]
        if len(self._kept) > _MOST_KEPT:  # something has been open for long: any of them will do once it has ended
            del self._kept[1:-1:2]
