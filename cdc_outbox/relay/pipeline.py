"""The pipeline: frames from the stream, through the router, to the publisher, counted by the watermark.

Pure: it is fed frames, hands on records, and returns when somebody has to do something in the world before it can go
on: wait for room, keep an event, look for a topic, carry out a request (see `stops`). Then it is fed again.
"""

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from cdc_outbox.errors import CdcOutboxError, MalformedStream, OperatorNeeded, PoisonEvent
from cdc_outbox.relay.plans import Plans
from cdc_outbox.relay.requests import REDRIVEN_HEADER, RedriveRequest
from cdc_outbox.relay.router import Record, Routing, Ruled, UnknownTopic
from cdc_outbox.relay.stops import (
    BATCH_FULL,
    DRAINED,
    DRY,
    FULL,
    Denied,
    NewTopic,
    Parking,
    RedriveRefused,
    Requested,
    Stop,
)
from cdc_outbox.relay.watermark import Batch, Watermark
from cdc_outbox.wal import pgoutput
from cdc_outbox.wal.frames import MESSAGE_START, XLOG_DATA, read_keepalive
from cdc_outbox.wal.lsn import LSN
from cdc_outbox.wal.position import Position

if TYPE_CHECKING:
    from cdc_outbox.relay.policy.gate import Gates

#: `feed` stops at the first transaction end at which the batch has this many events, for it to be closed.
#: Small enough that little is resent after a crash, large enough that its cost vanishes.
BATCH_EVENTS: Final = 500
_NONE: Final[AbstractSet[int]] = frozenset()
#: Why a redrive was refused: the policy does not allow it.
DENIED: Final = "denied"


class Publisher(Protocol):
    """What the pipeline needs of Kafka.

    ``publish`` has the shape of confluent_kafka.Producer.produce, so that nothing stands between the two: topic, value,
    key, partition (-1: by key), delivery callback, None, timestamp in Unix ms, headers. It raises BufferError when as
    much is in flight as may be, and ``refusal`` when the client will not take the event at all.
    """

    @property
    def publish(self) -> Callable[..., None]: ...
    @property
    def refusal(self) -> type[Exception]: ...

    def explain(self, refusal: Any, topic: str) -> CdcOutboxError:
        """What is to be done about a refusal."""
        ...

    def on_failure(self, error: Any, message: Any) -> None:
        """Raise what is to be done about a failed delivery report."""
        ...


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """What is known of an event that is to be published again."""

    record: Record
    event_id: bytes | None = None
    aggregate_type: bytes | None = None
    event_type: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Kept:
    """An event that has yet to be published: its Insert, or the request for it; its record as soon as it has one."""

    frame: bytes = b""
    request: RedriveRequest | None = None
    record: Record | None = None
    letter: DeadLetter | None = None


class Pipeline:
    """State of one replication stream. Thrown away with it: a late delivery report can then confirm nothing."""

    def __init__(
        self,
        routing: Routing,
        publisher: Publisher,
        settled: dict[int, set[int]] | None = None,
        *,
        started_at: int = 0,
        gates: "Gates | None" = None,
    ) -> None:
        """``settled``: events that the stream may bring once more, and that are kept durably since the first time:
        ordinals by commit LSN. They may be millions: each is given up once its transaction has come.

        ``started_at``: the LSN that the stream begins at; all before is settled. ``gates``: of the policy in force.
        """
        self._routers = routing.routers
        self._encoding = routing.encoding
        self._known_topics = routing.known_topics
        self._plans = Plans(routing, gates)
        self._publisher = publisher
        self._settled = {} if settled is None else settled
        self._commit_time_ms = 0
        #: of the transaction being received; nearly always empty
        self._settled_ordinals = _NONE
        self.watermark = Watermark(publisher.on_failure, started_at)
        #: commit LSN of the transaction being received; 0 between transactions
        self.open_commit_lsn = 0
        #: the Insert received last
        self._commit_lsn, self._ordinal = 0, 0
        #: those among the transaction's Inserts that are no events
        self._other_inserts = 0
        self._committed_events = 0
        #: the event that a stop was about
        self._kept: _Kept | None = None
        #: the event published last, while they are published one by one
        self._placed: _Kept | None = None
        #: the furthest LSN the server has told us about
        self.wal_end = 0
        self.reply_requested = False
        #: when set, `feed` stops at the next transaction end and leaves the rest unread
        self.draining = False
        self._one_by_one = False

    @property
    def in_transaction(self) -> bool:
        return self.open_commit_lsn != 0

    @property
    def gates(self) -> "Gates | None":
        """Of the policy in force."""
        return self._plans.gates

    @property
    def reached(self) -> Position:
        """Of the Insert received last."""
        return Position(self._commit_lsn, self._ordinal)

    @property
    def acknowledged_events(self) -> int:
        """Over the pipeline's life; to see whether it moves, not to count by (it lags behind inside ``feed``)."""
        published = self._committed_events + (self._ordinal - self._other_inserts if self.in_transaction else 0)
        return published - self.watermark.outstanding

    def feed(self, frames: Iterable[bytes]) -> Stop:
        """Carry ``frames`` to the publisher until they run dry, or until something is to be done before it goes on.

        The hot loop: per event one look-up, one row plan, one publish. `_place` does it for one event.
        Raises MalformedStream, OperatorNeeded, BrokerUnavailable. Whatever is raised, what is counted in is in flight.
        """
        if self._kept is not None and (stop := self._place(self._kept)):
            return stop
        plans, head = {} if self._one_by_one else self._plans.read, pgoutput.INSERT_HEAD
        publish = self._publisher.publish
        batch, commit_time_ms, ordinal = self.watermark.current, self._commit_time_ms, self._ordinal
        settled = self._settled_ordinals
        stop = None
        for frame in frames:
            # Bytes that no other message has: a hit is an Insert of a known relation with the right number of columns.
            plan = plans.get(frame[head])
            if plan is None:
                self._ordinal = ordinal
                stop = self._control(frame)
                batch, commit_time_ms, ordinal = self.watermark.current, self._commit_time_ms, self._ordinal
                settled = self._settled_ordinals
                if stop is not None:
                    break
                continue
            if not commit_time_ms:
                raise MalformedStream("an Insert outside a transaction")
            ordinal += 1
            if ordinal in settled:
                continue
            try:
                topic, value, key, headers = plan(frame, commit_time_ms)
            except (CdcOutboxError, UnknownTopic, Ruled) as error:
                self._ordinal = ordinal
                stop = self._not_placed(_Kept(frame), error)
                break
            batch.outstanding += 1
            batch.per_topic[topic] += 1
            try:
                publish(topic, value, key, -1, batch.on_delivery, None, commit_time_ms, headers)
            except BaseException as error:  # noqa: BLE001 - whatever it is, the event is not in flight
                batch.outstanding -= 1
                batch.per_topic[topic] -= 1
                self._ordinal = ordinal
                stop = self._not_placed(_Kept(frame, record=Record(topic, value, key, headers)), error)
                break
        self._ordinal = ordinal
        return stop or DRY

    def close_batch(self) -> Batch | None:
        """After a stop between two transactions: what they brought is confirmed together. None if that is nothing."""
        return None if self.in_transaction else self.watermark.close_batch()

    def publish_one_by_one(self) -> None:
        """From now on `feed` is given one frame at a time, and its event may be withdrawn."""
        self._one_by_one = True

    def publish_in_batches(self) -> None:
        """The end of ``publish_one_by_one``."""
        self._one_by_one, self._placed = False, None

    def admit(self, topic: str) -> None:
        """After NewTopic: it is there."""
        self._known_topics.add(topic)

    def govern(self, gates: "Gates") -> None:
        """After Requested: judge by these from here on."""
        self._plans.govern(gates)

    def redrive(self, request: RedriveRequest, letter: DeadLetter) -> None:
        """After Requested: publish it again, as an event of the transaction that asks for it."""
        header = (REDRIVEN_HEADER, b"%d" % request.dead_letter_id)
        record = letter.record._replace(headers=[*letter.record.headers, header])
        self._kept = _Kept(request=request, record=record, letter=letter)

    def refuse(self, error: CdcOutboxError) -> Parking | Denied | RedriveRefused:
        """After Full, NewTopic: the event can not be published. Raises ``error`` if that is no fault of the event."""
        kept, self._kept = self._kept, None
        assert kept is not None  # a stop was about it
        if isinstance(error, MalformedStream):
            error = PoisonEvent(error.message, reason="undecodable", hint=error.hint)
        if kept.request and isinstance(error, OperatorNeeded) and not isinstance(error, PoisonEvent):
            error = PoisonEvent(error.message, reason="not_writable")
        if not isinstance(error, PoisonEvent):
            raise error
        error = error.with_traceback(None)  # it holds whoever was publishing, down to the producer
        if kept.request:
            return RedriveRefused(kept.request, error)
        event = self._plans.describe(kept.frame, self._commit_time_ms)
        is_judged = error.reason != "undecodable" and not self._plans.router_of(kept.frame).expendable
        if is_judged and (ruling := self._plans.ruling_by_types(event)):
            return self._deny(Ruled(ruling, event))  # it stays inside, whatever is wrong with it
        return Parking(
            event=event,
            position=self.reached,
            commit_time_ms=self._commit_time_ms,
            poison=error,
            refused_by=kept.record.topic if kept.record else "",
            expendable=self._plans.router_of(kept.frame).expendable,
        )

    def withdraw(self, error: CdcOutboxError) -> Parking | Denied | RedriveRefused:
        """`refuse` the event published last, which is not in flight any more. Only one by one."""
        assert self._placed is not None
        assert self._placed.record is not None
        batch = self.watermark.current
        batch.outstanding -= 1
        batch.per_topic[self._placed.record.topic] -= 1
        if self._placed.request:
            batch.redriven.pop()
        self._kept = self._placed
        return self.refuse(error)

    def _place(self, kept: _Kept) -> Stop | None:
        """Publish one event. None if it is in flight."""
        try:
            kept = kept if kept.record else replace(kept, record=self._route(kept.frame))
            assert kept.record is not None
            topic, value, key, headers = kept.record
            if kept.letter:
                self._judge_again(kept.letter, kept.record)
                self._routers[0].check(topic)
        except (CdcOutboxError, UnknownTopic, Ruled) as error:
            return self._not_placed(kept, error)
        batch = self.watermark.current
        batch.outstanding += 1
        batch.per_topic[topic] += 1
        try:
            self._publisher.publish(topic, value, key, -1, batch.on_delivery, None, self._commit_time_ms, headers)
        except BaseException as error:  # noqa: BLE001 - as in `feed`
            batch.outstanding -= 1
            batch.per_topic[topic] -= 1
            return self._not_placed(kept, error)
        if kept.request:
            batch.redriven.append((kept.request.id, kept.request.dead_letter_id))
        self._kept = None
        self._placed = kept if self._one_by_one else None
        return None

    def _route(self, frame: bytes) -> Record:
        plan = self._plans.read[frame[pgoutput.INSERT_HEAD]]
        assert plan is not None
        return Record(*plan(frame, self._commit_time_ms))

    def _judge_again(self, letter: DeadLetter, record: Record) -> None:
        """As an event of today's. Raises PoisonEvent if the policy does not allow it."""
        if self._plans.gates is None:
            return
        types = (letter.aggregate_type, letter.event_type)
        ruling = self._plans.gates.judge(types, letter.event_id, *record, self._commit_time_ms, "redrive")
        if not ruling.is_allowed:
            raise PoisonEvent(f"the policy does not allow it: {ruling.explanation}", reason=DENIED)

    def _deny(self, ruled: Ruled) -> Denied:
        assert self._plans.gates is not None
        batch = self.watermark.current
        batch.outstanding += 1
        return Denied(
            event=ruled.event,
            record=ruled.event.record,
            batch=batch,
            position=self.reached,
            commit_time_ms=self._commit_time_ms,
            ruling=ruled.ruling,
            policy_sha256=self._plans.gates.policy.sha256,
        )

    def _not_placed(self, kept: _Kept, error: BaseException) -> Stop:
        """Why, or raise it. The event is kept, and counted nowhere."""
        if isinstance(error, Ruled):
            self._kept = None
            return self._deny(error)
        self._kept = kept
        if isinstance(error, BufferError):
            return FULL
        if isinstance(error, UnknownTopic):
            return NewTopic(error.topic)
        if isinstance(error, self._publisher.refusal):
            assert kept.record is not None  # it came as far as the publisher
            error = self._publisher.explain(error, kept.record.topic)
        if isinstance(error, CdcOutboxError):
            return self.refuse(error)
        raise error

    def _control(self, frame: bytes) -> Stop | None:
        """Take in everything but events. Why to stop, or None."""
        if len(frame) <= MESSAGE_START or frame[0] != XLOG_DATA:
            keepalive = read_keepalive(frame)
            self.reply_requested |= keepalive.reply_requested
            self.wal_end = max(self.wal_end, keepalive.wal_end)
            return DRAINED if self.draining and not self.in_transaction else None
        tag = frame[MESSAGE_START]
        if tag == pgoutput.BEGIN:
            self._begin(frame)
        elif tag == pgoutput.COMMIT:
            self._commit(frame)
            if self.draining:
                return DRAINED
            return BATCH_FULL if self.watermark.current.events >= BATCH_EVENTS else None
        elif tag == pgoutput.INSERT:
            return self._insert(frame)
        elif tag == pgoutput.RELATION:
            self._plans.introduce(pgoutput.read_relation(frame, self._encoding))
        elif tag not in pgoutput.WITHOUT_EVENT:
            raise MalformedStream(f"unsupported pgoutput message {bytes([tag])!r}")
        return None

    def _insert(self, frame: bytes) -> Stop | None:
        """An Insert into a table that holds no events; while they are published one by one, any."""
        head = frame[pgoutput.INSERT_HEAD]
        if head not in self._plans.read or not self.in_transaction:
            raise MalformedStream("an Insert into a relation, or with a number of columns, that was not announced")
        self._ordinal += 1
        if self._plans.read[head]:
            return None if self._ordinal in self._settled_ordinals else self._place(_Kept(frame))
        self._other_inserts += 1
        request = self._plans.request(frame)
        if isinstance(request, RedriveRequest):
            self._other_inserts -= 1  # what it asks for is an event
        return Requested(request) if request else None

    def _begin(self, frame: bytes) -> None:
        if self.open_commit_lsn:
            raise MalformedStream(f"a Begin inside the transaction that commits at {LSN(self.open_commit_lsn)}")
        self.open_commit_lsn, self._commit_time_ms = pgoutput.read_begin(frame)
        self._commit_lsn, self._ordinal, self._other_inserts = self.open_commit_lsn, 0, 0
        self._settled_ordinals = self._settled.pop(self.open_commit_lsn, _NONE)  # a transaction begins once
        batch = self.watermark.current
        batch.first_commit_time_ms = batch.first_commit_time_ms or self._commit_time_ms

    def _commit(self, frame: bytes) -> None:
        wal_end, commit_lsn, end_lsn = pgoutput.read_commit(frame)
        if commit_lsn != self.open_commit_lsn:
            raise MalformedStream(
                f"a Commit at {LSN(commit_lsn)} of a transaction announced for {LSN(self.open_commit_lsn)}"
            )
        self.open_commit_lsn = self._commit_time_ms = 0
        self.wal_end = wal_end
        batch = self.watermark.current
        batch.end_lsn = end_lsn
        events = self._ordinal - self._other_inserts
        batch.events += events
        self._committed_events += events
