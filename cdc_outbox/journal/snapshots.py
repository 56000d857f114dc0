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
    #: sessions that were in a transaction when others had reported, and were so ever since; None before that
    reporting: frozenset[str] | None = None
    #: when the last of them was seen outside of one
    reported_at: float = float("inf")


class Snapshots:
    def __init__(self) -> None:
        self._kept: list[Snapshot] = []
        self.ended: Snapshot | None = None
        """The latest of which all has ended."""
        self.counted: Snapshot | None = None
        """The latest of which all is counted."""

    def add(self, taken: Snapshot, in_transaction: frozenset[str]) -> None:
        """``in_transaction``: the sessions but ours that are in one, as their virtual transaction ids name them.

        Not the transactions: a procedure may commit again and again and report at its end only.
        """
        kept = self._kept
        # While something is open for long a snapshot every now and then will do: a hundredth of the time it has lasted.
        if not kept or (taken.at - kept[-1].at) * _MOST_KEPT >= taken.at - kept[0].at:
            kept.append(taken)
        for snapshot in kept:
            if snapshot.at + COUNTED_SECONDS <= taken.at:
                before = in_transaction if snapshot.reporting is None else snapshot.reporting
                snapshot.reporting = in_transaction & before
                if not snapshot.reporting:
                    snapshot.reported_at = min(snapshot.reported_at, taken.at)
        ended = [snapshot for snapshot in (*kept, taken) if snapshot.xmax <= taken.xmin]
        counted = [snapshot for snapshot in ended if snapshot.reported_at + _REPORTED_SECONDS <= taken.at]
        self.ended, self.counted = _later(self.ended, ended), _later(self.counted, counted)
        if self.counted:
            self._kept = [snapshot for snapshot in kept if snapshot.at >= self.counted.at]


def _later(known: Snapshot | None, found: list[Snapshot]) -> Snapshot | None:
    return max([*([known] if known else []), *found], key=lambda snapshot: snapshot.at, default=None)
