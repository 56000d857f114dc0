"""The relay's state in schema cdc_outbox, for one session: dead letters, and notes of what is and may be confirmed.

Over a connection of its own, from the session's thread, and synchronously: an event is settled when its dead letter is
committed, and nothing is confirmed beyond what was noted. If the connection breaks, the session ends and starts anew.
"""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, Protocol

from cdc_outbox.config import Config
from cdc_outbox.errors import PoisonEvent, ServerStopping, TopicRefused
from cdc_outbox.journal import dead_letters
from cdc_outbox.journal.continuity import HEADROOM_BYTES, Continuity
from cdc_outbox.journal.settlement import Settlement
from cdc_outbox.postgres.connection import BoundedConnection
from cdc_outbox.postgres.publication import SentTable
from cdc_outbox.relay.dead_letters import DeadLetter, DeadLetters, RedriveRequest
from cdc_outbox.relay.headers import Headers
from cdc_outbox.relay.router import Record
from cdc_outbox.service.logs import get_logger
from cdc_outbox.service.metrics import Metrics
from cdc_outbox.wal.lsn import LSN

_LONGEST_SHOWN: Final = 200
#: While events flow the note is renewed so often, so that it tells much even after a crash.
_NOTE_EVERY_SECONDS: Final = 1.0


class SessionState(DeadLetters, Protocol):
    """What the session asks on top of what the pipeline does."""

    def confirming(self, lsn: LSN, *, carried: bool, last: bool = False) -> None: ...
    def redriven(self, requests: Sequence[tuple[int, int]]) -> None: ...


class Stateless:
    """Keeps nothing and notes nothing: for `tail`, and for a database that has no schema cdc_outbox. Poison stops."""

    def put(self, letter: DeadLetter) -> None:
        raise stopped_by(letter)

    def settled_ordinals(self, commit_lsn: int) -> frozenset[int]:  # noqa: ARG002
        return frozenset()

    def take(self, request: RedriveRequest) -> Record | None:
        get_logger().warning("redrive_passed_over", dead_letter=request.dead_letter_id, state="not ours to read")
        return None

    def refused_again(self, request: RedriveRequest, poison: PoisonEvent) -> None:
        """`take` gives nothing that could be."""

    def redriven(self, requests: Sequence[tuple[int, int]]) -> None:
        """Nothing ever is."""

    def confirming(self, lsn: LSN, *, carried: bool, last: bool = False) -> None:
        """Of no interest here."""


class RelayState:
    def __init__(
        self,
        connection: BoundedConnection,
        continuity: Continuity,
        metrics: Metrics,
        *,
        config: Config,
        confirmed: LSN,
        sent: SentTable,
        walsender_pid: int,
    ) -> None:
        """``confirmed`` is where the slot stands: dead letters after it may come by once more. ``walsender_pid`` is the
        stream's, which has the slot.
        """
        self._connection = connection
        self._continuity = continuity
        self._metrics = metrics
        self._slot = slot = config.postgres.slot
        self._on_poison = config.relay.on_poison
        self._walsender_pid = walsender_pid
        self._log = get_logger()
        self._settlement = Settlement(connection, slot, continuity.system_identifier, sent, confirmed=confirmed)
        self._noted_at = time.monotonic()
        #: events were confirmed since
        self._unnoted = False
        self._is_server_stopping = False
        #: dead letters that are published again and not acknowledged yet
        self._in_flight: set[int] = set()
        settled: defaultdict[int, set[int]] = defaultdict(set)
        system = continuity.system_identifier
        for commit_lsn, ordinal in dead_letters.settled_since(connection, system, slot, confirmed):
            settled[commit_lsn].add(ordinal)
        self._settled = {commit_lsn: frozenset(ordinals) for commit_lsn, ordinals in settled.items()}

    def put(self, letter: DeadLetter) -> None:
        """Raises PoisonEvent unless dead letters are asked for; TopicRefused for an expendable event."""
        if letter.expendable:
            raise TopicRefused(letter.poison.message, topic=letter.event.topic or "", hint=letter.poison.hint)
        if self._on_poison == "stop":
            raise stopped_by(letter)
        event, poison = letter.event, letter.poison
        is_new = dead_letters.put(
            self._connection,
            {
                "system_identifier": self._continuity.system_identifier,
                "slot": self._slot,
                "commit_lsn": str(letter.commit_lsn),
                "ordinal": letter.ordinal,
                "committed_at": datetime.fromtimestamp(letter.commit_time_ms / 1000, UTC),
                "event_id": event.event_id,
                "aggregate_type": event.aggregate_type,
                "aggregate_id": event.aggregate_id,
                "event_type": event.event_type,
                "topic": event.topic,
                "key": event.key,
                "headers": _headers_to_json(event.headers),
                "payload": event.payload,
                "reason": poison.reason,
                "detail": poison.message,
            },
        )
        if is_new:
            self._metrics.dead_letters.labels(letter.refused_by, poison.reason).inc()
        self._log.warning(
            "dead_lettered",
            event_id=_shown(event.event_id),
            topic=_shown(event.topic),
            commit_lsn=str(letter.commit_lsn),
            ordinal=letter.ordinal,
            reason=poison.message,
        )

    def settled_ordinals(self, commit_lsn: int) -> frozenset[int]:
        return self._settled.get(commit_lsn, frozenset())

    def take(self, request: RedriveRequest) -> Record | None:
        """Of its own rows only: what else the requester wrote may not be visible yet."""
        if request.slot != self._slot or dead_letters.has_outcome(self._connection, request.id):
            return None  # another relay's, or carried out before a crash
        letter = dead_letters.to_redrive(self._connection, request.dead_letter_id)
        state = letter["state"] if letter else "unknown"
        if letter is None or state in ("redriven", "discarded") or request.dead_letter_id in self._in_flight:
            self._log.warning("redrive_passed_over", dead_letter=request.dead_letter_id, state=state)
            dead_letters.passed_over(self._connection, request.id, request.dead_letter_id)
            return None
        topic = request.topic or letter["topic"] or ""
        key = request.key if request.key is not None else letter["key"] or b""
        self._log.info("redriving", dead_letter=request.dead_letter_id, topic=topic)
        self._in_flight.add(request.dead_letter_id)
        return Record(topic, letter["payload"], key, _headers_from_json(letter["headers"]))

    def refused_again(self, request: RedriveRequest, poison: PoisonEvent) -> None:
        self._in_flight.discard(request.dead_letter_id)
        self._log.warning("redrive_refused", dead_letter=request.dead_letter_id, reason=poison.message)
        dead_letters.refused_again(
            self._connection, request.id, request.dead_letter_id, reason=poison.reason, detail=poison.message
        )

    def redriven(self, requests: Sequence[tuple[int, int]]) -> None:
        dead_letters.redriven(self._connection, dict(requests))
        self._in_flight.difference_update(dead_letter_id for _, dead_letter_id in requests)

    def confirming(self, lsn: LSN, *, carried: bool, last: bool = False) -> None:
        """To be called before ``lsn`` is confirmed; ``last`` if nothing will be after it.

        ``carried`` if events were settled by it: on an idle relay only WAL moves, and a note must not make more of it.
        """
        if not lsn:  # nothing was settled yet: the server takes no notice of it
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


def stopped_by(letter: DeadLetter) -> PoisonEvent:
    """Names everything but the payload."""
    event = letter.event
    return PoisonEvent(
        f"event {_shown(event.event_id)} of aggregate {_shown(event.aggregate_id)} for topic "
        f"{_shown(event.topic)} can never be published: {letter.poison.message} "
        f"(event {letter.ordinal} of the transaction that commits at {letter.commit_lsn})",
        reason=letter.poison.reason,
        hint=f'{letter.poison.hint or "correct what writes such rows"}; or set relay.on_poison = "dead-letter"',
    )


def _shown(value: str | None) -> str:
    """On one line, of what may be of any length and hold anything."""
    if value is None:
        return "(none)"
    short = value if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]}..."
    return short if short.isprintable() else repr(short)


def _headers_to_json(headers: Headers) -> str:
    """In ASCII: the database may not know every character that JSON does."""
    return json.dumps([(name, None if value is None else value.decode(errors="replace")) for name, value in headers])


def _headers_from_json(pairs: list[tuple[str, str | None]]) -> Headers:
    return [(name, None if value is None else value.encode()) for name, value in pairs]
