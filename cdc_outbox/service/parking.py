"""Parking: what the session does about events that can not, or must not, be published, and about operators' requests.

The configuration decides whether such an event is kept or ends the relay; the journal keeps it; log and metrics tell.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

from cdc_outbox.errors import PoisonEvent, TopicRefused
from cdc_outbox.journal.journal import PassedOver, PolicyRefused
from cdc_outbox.relay.pipeline import DeadLetter
from cdc_outbox.relay.requests import PolicyRequest, RedriveRequest
from cdc_outbox.relay.stops import Denied, Parking, RedriveRefused
from cdc_outbox.service.logs import get_logger
from cdc_outbox.service.metrics import Metrics
from cdc_outbox.wal.lsn import LSN
from cdc_outbox.wal.position import Position

if TYPE_CHECKING:
    from cdc_outbox.relay.policy.gate import Gates

_LONGEST_SHOWN: Final = 200
#: What the policy denies is recorded in one statement: at so many events, so many bytes, or so much later.
_MOST_DENIED: Final = 500
_MOST_DENIED_BYTES: Final = 4_000_000
_RECORD_AFTER_SECONDS: Final = 0.02


class SessionJournal(Protocol):
    """What the session needs of `journal.journal`, which says what each does."""

    @property
    def written_lsn(self) -> LSN: ...
    def standbys_have(self, lsn: LSN) -> bool: ...
    @property
    def gates(self) -> "Gates | None": ...
    def park(self, parking: Parking) -> bool: ...
    def deny(self, denied: Sequence[Denied]) -> None: ...
    def activate(self, request: PolicyRequest, position: Position) -> "Gates | PolicyRefused | None": ...
    def take(self, request: RedriveRequest) -> DeadLetter | PassedOver | None: ...
    def redrive_refused(self, request: RedriveRequest, poison: PoisonEvent) -> None: ...
    def redriven(self, requests: Sequence[tuple[int, int]]) -> None: ...
    def confirming(self, lsn: LSN, *, carried: bool, last: bool = False) -> None: ...


class Parker:
    def __init__(self, journal: SessionJournal, metrics: Metrics, *, keeps: bool) -> None:
        """``keeps``: relay.on_poison is "dead-letter"; else the first such event is raised."""
        self.journal = journal
        self._metrics = metrics
        self._keeps = keeps
        #: denied, and not recorded yet; since when, monotonic seconds
        self._denied: list[Denied] = []
        self._denied_bytes = 0
        self._denied_since = 0.0
        self._log = get_logger()

    def park(self, parking: Parking) -> None:
        """Raises PoisonEvent unless such events are kept; TopicRefused for an expendable one."""
        event, poison = parking.event, parking.poison
        if parking.expendable:
            raise TopicRefused(poison.message, topic=event.topic or "", hint=poison.hint)
        if not self._keeps:
            raise _stopped_by(parking)
        if self.journal.park(parking):
            self._metrics.dead_letters.labels(parking.refused_by, poison.reason).inc()
        self._log.warning(
            "dead_lettered",
            event_id=_shown(event.event_id),
            topic=_shown(event.topic),
            commit_lsn=str(LSN(parking.position.commit_lsn)),
            ordinal=parking.position.ordinal,
            reason=poison.message,
        )

    def deny(self, denied: Denied) -> None:
        """Recorded with others, see ``flush``. No line of the log for each: they may be many."""
        self._denied_since = self._denied_since or time.monotonic()
        self._denied.append(denied)
        self._denied_bytes += len(denied.record.value or b"")
        if len(self._denied) >= _MOST_DENIED or self._denied_bytes >= _MOST_DENIED_BYTES:
            self.flush()

    def flush_if_due(self) -> None:
        if self._denied and time.monotonic() - self._denied_since >= _RECORD_AFTER_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Record what the policy denied. It is settled then, and counted out of its batch."""
        if not self._denied:
            return
        self.journal.deny(self._denied)
        for denied in self._denied:
            denied.batch.outstanding -= 1
            denied.batch.written_lsn = self.journal.written_lsn
            self._metrics.judged(denied.ruling)
        self._denied, self._denied_bytes, self._denied_since = [], 0, 0.0

    def activate(self, request: PolicyRequest, position: Position) -> "Gates | None":
        """What is to be judged by from now on; None if nothing is to change."""
        made = self.journal.activate(request, position)
        if isinstance(made, PolicyRefused):
            self._metrics.requests_refused.labels("policy").inc()
            self._log.warning("policy_refused", reason=made.detail, principal=request.principal)
            return None
        if made is not None:
            sha256 = made.policy.sha256.hex()
            self._log.info("policy_in_force", sha256=sha256, lsn=str(LSN(position.commit_lsn)), by=request.principal)
        return made

    def take(self, request: RedriveRequest) -> DeadLetter | None:
        """What is to be published again; None if nothing is."""
        found = self.journal.take(request)
        if isinstance(found, PassedOver):
            self._log.warning("redrive_passed_over", dead_letter=request.dead_letter_id, state=found.state)
            return None
        if found:
            self._log.info("redriving", dead_letter=request.dead_letter_id, topic=found.record.topic)
        return found

    def refuse(self, refused: RedriveRefused) -> None:
        request, poison = refused.request, refused.poison
        self._metrics.requests_refused.labels("redrive").inc()
        self._log.warning("redrive_refused", dead_letter=request.dead_letter_id, reason=poison.message)
        self.journal.redrive_refused(request, poison)


def _stopped_by(parking: Parking) -> PoisonEvent:
    """Names everything but the payload."""
    event, position, poison = parking.event, parking.position, parking.poison
    return PoisonEvent(
        f"event {_shown(event.event_id)} of aggregate {_shown(event.aggregate_id)} for topic "
        f"{_shown(event.topic)} can never be published: {poison.message} "
        f"(Insert {position.ordinal} of the transaction that commits at {LSN(position.commit_lsn)})",
        reason=poison.reason,
        hint=f'{poison.hint or "correct what writes such rows"}; or set relay.on_poison = "dead-letter"',
    )


def _shown(value: str | None) -> str:
    """On one line, of what may be of any length and hold anything."""
    if value is None:
        return "(none)"
    short = value if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]}..."
    return short if short.isprintable() else repr(short)
