"""The journal of one session: what the relay remembers beside the log, in schema cdc_outbox.

Events that can never be published are kept here; redrives are looked up and recorded; and what is confirmed is noted
beforehand. Over a connection of its own, from the session's thread, and synchronously: nothing is confirmed beyond what
was noted, and an event is settled when its row is committed. With a `failover` slot the standbys of
synchronized_standby_slots must have that row, too: the server waits for them before it sends an event, and the row is
written after that. If the connection breaks, the session ends.
Source: PostgreSQL manual, "Logical Replication Failover"; walsender.c (StandbySlotsHaveCaughtup).
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from cdc_outbox.errors import BrokenInvariant, OperatorNeeded, PoisonEvent, ServerStopping
from cdc_outbox.journal import outcomes, parked, policies
from cdc_outbox.journal.continuity import HEADROOM_BYTES, Continuity
from cdc_outbox.journal.settlement import Settlement
from cdc_outbox.postgres.connection import BoundedConnection, translated
from cdc_outbox.postgres.publication import SentTable
from cdc_outbox.postgres.slots import Slot
from cdc_outbox.relay.headers import Headers
from cdc_outbox.relay.pipeline import DENIED, DeadLetter
from cdc_outbox.relay.policy.binding import event_sha256
from cdc_outbox.relay.requests import PolicyRequest, RedriveRequest
from cdc_outbox.relay.router import Record
from cdc_outbox.relay.stops import Denied, Parking
from cdc_outbox.wal.lsn import LSN
from cdc_outbox.wal.position import Position

if TYPE_CHECKING:
    from cdc_outbox.relay.policy.gate import Gates

#: While events flow the note is renewed so often, so that it tells much even after a crash.
_NOTE_EVERY_SECONDS: Final = 1.0
_STANDBYS_HAVE: Final = """
    SELECT coalesce(bool_and(coalesce(slot.restart_lsn >= %s::pg_lsn, false)), true)
      FROM unnest(string_to_array(current_setting('synchronized_standby_slots'), ',')) AS name
      LEFT JOIN pg_replication_slots AS slot ON slot.slot_name = btrim(name, ' "')
"""


@dataclass(frozen=True, slots=True)
class PolicyRefused:
    """A policy that cannot govern; the one before stays in force."""

    detail: str


@dataclass(frozen=True, slots=True)
class PassedOver:
    """Nothing is to be done about a request; ``state`` of what it is about says why."""

    state: str


class NoJournal:
    """Keeps nothing and notes nothing: for `tail`, and for a database that has no schema cdc_outbox."""

    gates: "Gates | None" = None
    started_at = LSN(0)
    written_lsn = LSN(0)

    @property
    def settled(self) -> dict[int, set[int]]:
        return {}

    def standbys_have(self, lsn: LSN) -> bool:  # noqa: ARG002
        return True

    def park(self, parking: Parking) -> bool:
        raise BrokenInvariant(f"event {parking.position} cannot be parked: there is no journal")

    def deny(self, denied: Sequence[Denied]) -> None:
        raise BrokenInvariant(f"event {denied[0].position} cannot be denied: there is no journal")

    def activate(self, request: PolicyRequest, position: Position) -> None:
        """Nothing is judged."""

    def take(self, request: RedriveRequest) -> PassedOver:  # noqa: ARG002
        return PassedOver("not ours to read")

    def redrive_refused(self, request: RedriveRequest, poison: PoisonEvent) -> None:
        """`take` gives nothing that could be."""

    def redriven(self, requests: Sequence[tuple[int, int]]) -> None:
        """Nothing ever is."""

    def confirming(self, lsn: LSN, *, carried: bool, last: bool = False) -> None:
        """Of no interest here."""


class Journal:
    def __init__(
        self,
        connection: BoundedConnection,
        continuity: Continuity,
        *,
        slot: Slot,
        started_at: LSN,
        sent: SentTable,
        walsender_pid: int,
    ) -> None:
        """``started_at`` is where reading starts, if that is later than where ``slot`` stands.

        ``walsender_pid`` is the stream's, which has the slot.
        """
        confirmed = slot.confirmed_lsn or LSN(0)
        self._connection = connection
        self._continuity = continuity
        self._slot = slot.name
        #: all before is settled
        self.started_at = max(confirmed, started_at)
        self._walsender_pid = walsender_pid
        self._settlement = Settlement(connection, slot.name, continuity.system_identifier, sent, confirmed=confirmed)
        self._noted_at = time.monotonic()
        #: events were confirmed since
        self._unnoted = False
        self._is_server_stopping = False
        #: dead letters that are published again and not acknowledged yet
        self._in_flight: set[int] = set()
        #: events that are kept here, and that the stream may bring once more: ordinals by commit LSN
        self.settled = parked.settled_since(connection, continuity.system_identifier, slot.name, confirmed)
        #: of the policy in force where reading starts
        self.gates = policies.in_force(connection, continuity.system_identifier, slot.name, before=self.started_at)
        self._is_failover = bool(slot.failover)
        #: end of the log after what was written last about an event, if standbys must have it before that is confirmed
        self.written_lsn = LSN(0)
        if self.settled:
            self._look_where_the_log_ends()

    def park(self, parking: Parking) -> bool:
        """Keep an event that can never be published. False if it was kept before."""
        event, poison = parking.event, parking.poison
        is_new = parked.put(
            self._connection,
            {
                **self._identity(parking),
                **_columns_of(event.record),
                "topic": event.topic,
                "key": event.key,
                "reason": poison.reason,
                "detail": poison.message,
                "state": "dead",
            },
        )
        self._look_where_the_log_ends()
        return is_new

    def deny(self, denied: Sequence[Denied]) -> None:
        """Record what the policy keeps inside, and why."""
        parked.put_all(self._connection, [{**self._identity(each), **_ruled_columns(each)} for each in denied])
        self._look_where_the_log_ends()

    def _identity(self, stop: Parking | Denied) -> dict[str, Any]:
        event = stop.event
        return {
            "system_identifier": self._continuity.system_identifier,
            "slot": self._slot,
            "commit_lsn": str(LSN(stop.position.commit_lsn)),
            "ordinal": stop.position.ordinal,
            "committed_at": datetime.fromtimestamp(stop.commit_time_ms / 1000, UTC),
            "event_id": event.event_id,
            "aggregate_type": event.aggregate_type,
            "aggregate_id": event.aggregate_id,
            "event_type": event.event_type,
        }

    def activate(self, request: PolicyRequest, position: Position) -> "Gates | PolicyRefused | None":
        """What is to be judged by from ``position`` on; None if nothing is to change.

        A request that comes once more after a crash has the outcome that it had.
        """
        if request.slot != self._slot:
            return None
        before = outcomes.outcome_of(self._connection, request.id)
        if before == "refused":
            return None
        gates = policies.compiled(request.source)
        if isinstance(gates, str) and before == "activated":
            raise OperatorNeeded(f"the policy of request {request.id} cannot be read any more: {gates}")
        if isinstance(gates, str):
            outcomes.record(self._connection, {request.id: None}, "refused", gates)
            return PolicyRefused(gates)
        policies.activated(self._connection, self._continuity.system_identifier, request, position, gates.policy.sha256)
        self._look_where_the_log_ends()
        return gates

    def take(self, request: RedriveRequest) -> DeadLetter | PassedOver | None:
        """What is to be published; None if the request is another relay's, or was carried out before a crash.

        Of the relay's own rows only: what else the requester wrote may not be visible yet.
        """
        if request.slot != self._slot or outcomes.outcome_of(self._connection, request.id):
            return None
        letter = parked.to_redrive(self._connection, request.dead_letter_id)
        state = letter["state"] if letter else "unknown"
        if letter is None or state != "dead" or request.dead_letter_id in self._in_flight:
            detail = "it is being redriven" if state == "dead" else f"it is {state}"
            outcomes.record(self._connection, {request.id: request.dead_letter_id}, "passed over", detail)
            self._look_where_the_log_ends()
            return PassedOver(state)
        topic = request.topic or letter["topic"] or ""
        key = request.key if request.key is not None else letter["key"] or b""
        self._in_flight.add(request.dead_letter_id)
        record = Record(topic, letter["payload"], key, _headers_from_json(letter["headers"]))
        return DeadLetter(record, *(_bytes(letter[column]) for column in ("event_id", "aggregate_type", "event_type")))

    def redrive_refused(self, request: RedriveRequest, poison: PoisonEvent) -> None:
        self._in_flight.discard(request.dead_letter_id)
        if poison.reason == DENIED:  # it was not tried, and is a dead letter for the reason that it was
            outcomes.record(self._connection, {request.id: request.dead_letter_id}, "refused", poison.message)
        else:
            parked.refused_again(
                self._connection, request.id, request.dead_letter_id, reason=poison.reason, detail=poison.message
            )
        self._look_where_the_log_ends()

    def redriven(self, requests: Sequence[tuple[int, int]]) -> None:
        """Ids of requests, and of the dead letters that Kafka has acknowledged now."""
        parked.redriven(self._connection, dict(requests))
        self._look_where_the_log_ends()
        self._in_flight.difference_update(dead_letter_id for _, dead_letter_id in requests)

    def confirming(self, lsn: LSN, *, carried: bool, last: bool = False) -> None:
        """To be called before ``lsn`` is confirmed; ``last`` if nothing will be after it.

        ``carried`` if events were settled by it: on an idle relay only WAL moves, and a note must not make more of it.
        """
        if not lsn:  # nothing is known to be settled: the server takes no notice of it
            return
        if carried:
            self._unnoted = True
            self._settlement.carried()
        if last:
            self._settlement.settled(lsn)
            self._note(lsn, limit=lsn)
        elif lsn > self._continuity.limit:
            self._note_what_is_due(lsn, is_needed=True)
        elif not self._is_server_stopping:
            try:
                self._note_what_is_due(lsn, is_needed=False)
            except ServerStopping:
                # It has ended this session, and waits with the stream's end for what we confirm: that is noted for.
                self._is_server_stopping = True
        self._continuity.confirmed(lsn)

    def standbys_have(self, lsn: LSN) -> bool:
        """Whether all that the server waits for, before it sends anything of this slot, have the log up to ``lsn``."""
        with translated("looking at synchronized_standby_slots"):
            row = self._connection.execute(_STANDBYS_HAVE, [str(lsn)]).fetchone()
        return row == (True,)

    def _look_where_the_log_ends(self) -> None:
        if not self._is_failover:
            return
        with translated("asking where the log ends"):
            row = self._connection.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
        assert row is not None
        self.written_lsn = LSN.parse(row[0])

    def _note_what_is_due(self, lsn: LSN, *, is_needed: bool) -> None:
        self._settlement.settled(lsn)
        now = time.monotonic()
        is_old = self._unnoted and now - self._noted_at >= _NOTE_EVERY_SECONDS
        # The snapshot first: on an idle server it is the note's commit that takes the log past it.
        if self._settlement.take_if_due() or is_old or is_needed:
            self._note(lsn, limit=LSN(lsn + HEADROOM_BYTES))
            self._noted_at, self._unnoted = now, False

    def _note(self, lsn: LSN, *, limit: LSN) -> None:
        self._continuity.note(self._connection, lsn, limit=limit, walsender_pid=self._walsender_pid)


def _columns_of(record: Record) -> dict[str, Any]:
    return {
        "topic": record.topic,
        "key": record.key,
        "headers": _headers_to_json(record.headers),
        "payload": record.value,
    }


def _ruled_columns(denied: Denied) -> dict[str, Any]:
    ruling = denied.ruling
    columns = {
        **_columns_of(denied.record),
        "event_sha256": event_sha256(denied.record),
        "rule": ruling.rule,
        "rule_sha256": ruling.rule_sha256,
        "policy_sha256": denied.policy_sha256,
        "reason": "error" if ruling.is_error else "rule" if ruling.rule else "default",
        "detail": ruling.explanation,
        "state": "denied",
    }
    if getattr(ruling.action, "keep", "payload") == "hash":
        columns["payload"] = None
    return columns


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode()


def _headers_to_json(headers: Headers) -> str:
    """In ASCII: the database may not know every character that JSON does."""
    return json.dumps([(name, None if value is None else value.decode(errors="replace")) for name, value in headers])


def _headers_from_json(pairs: list[tuple[str, str | None]]) -> Headers:
    return [(name, None if value is None else value.encode()) for name, value in pairs]
