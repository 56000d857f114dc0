"""The pipeline: frames from the stream, through the router, to the publisher, counted by the watermark.

Pure: it is handed frames and hands on records. When to read, wait, poll or confirm is `service.session`'s business.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from cdc_outbox.errors import CdcOutboxError, MalformedStream, OperatorNeeded, PoisonEvent
from cdc_outbox.relay.dead_letters import (
    REDRIVE_REQUESTS,
    REDRIVEN_HEADER,
    DeadLetter,
    DeadLetters,
    RedriveRequest,
)
from cdc_outbox.relay.router import Record, Router, Routing
from cdc_outbox.relay.watermark import Watermark
from cdc_outbox.wal import pgoutput
from cdc_outbox.wal.frames import MESSAGE_START, XLOG_DATA, read_keepalive
from cdc_outbox.wal.lsn import LSN
from cdc_outbox.wal.row_plan import InsertFunction, InsertReader, compile_insert_reader

#: A batch is closed at the first transaction end at which it has this many events, or at which a read ends.
#: Small enough that little is resent after a crash, large enough that its cost vanishes.
BATCH_EVENTS: Final = 500
_REQUEST_COLUMNS: Final = ("id", "slot", "dead_letter_id", "topic", "key")


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


class Pipeline:
    """State of one replication stream. Thrown away with it: a late delivery report can then confirm nothing."""

    def __init__(
        self,
        routing: Routing,
        publisher: Publisher,
        dead_letters: DeadLetters,
        wait_for_room: Callable[[], bool],
    ) -> None:
        """``wait_for_room`` lets what is in flight become less; False if nothing is."""
        self._routers = routing.routers
        self._strays = routing.strays
        self._encoding = routing.encoding
        #: by an Insert's head
        self._router_of: dict[bytes, Router] = {}
        self._publisher = publisher
        self._dead_letters = dead_letters
        self._wait_for_room = wait_for_room
        #: by an Insert's head; None for tables that hold no events
        self._plans: dict[bytes, InsertFunction | None] = {}
        self._relations: dict[bytes, pgoutput.Relation] = {}
        self._read_request: dict[bytes, InsertReader] = {}
        #: what Inserts that nobody routes are answered with, where they must not pass
        self._refusals: dict[bytes, OperatorNeeded] = {}
        self._commit_time_ms = 0
        #: events of the transaction being received that are dead letters already; nearly always empty
        self._settled_ordinals: frozenset[int] = frozenset()
        self.watermark = Watermark(publisher.on_failure)
        #: commit LSN of the transaction being received; 0 between transactions
        self.open_commit_lsn = 0
        #: commit LSN of the transaction received last, or being received
        self.last_commit_lsn = 0
        #: events of that transaction so far: with the commit LSN, an event's identity in the stream
        self.ordinal = 0
        self._committed_events = 0
        #: the furthest LSN the server has told us about
        self.wal_end = 0
        self.reply_requested = False
        #: when set, `feed` stops at the next transaction end and leaves the rest unread
        self.draining = False

    @property
    def in_transaction(self) -> bool:
        return self.open_commit_lsn != 0

    @property
    def reached(self) -> tuple[int, int]:
        """The event received last: commit LSN and ordinal. Grows along the stream."""
        return self.last_commit_lsn, self.ordinal

    @property
    def acknowledged_events(self) -> int:
        """Over the pipeline's life; to see whether it moves, not to count by (it lags behind inside ``feed``)."""
        published = self._committed_events + (self.ordinal if self.in_transaction else 0)
        return published - self.watermark.outstanding

    def feed(self, frames: Iterable[bytes]) -> None:
        """Carry ``frames`` to the publisher. The hot loop: per event one look-up, one row plan, one publish.

        Raises MalformedStream, PoisonEvent, OperatorNeeded, BrokerUnavailable; whatever ``wait_for_room`` raises.
        """
        plans, head = self._plans, pgoutput.INSERT_HEAD
        publish, refusal = self._publisher.publish, self._publisher.refusal
        batch, commit_time_ms, ordinal = self.watermark.current, self._commit_time_ms, self.ordinal
        settled = self._settled_ordinals
        for frame in frames:
            # Bytes that no other message has: a hit is an Insert of a known relation with the right number of columns.
            plan = plans.get(frame[head])
            if plan is None:
                self.ordinal = ordinal
                done = self._control(frame)
                batch, commit_time_ms, ordinal = self.watermark.current, self._commit_time_ms, self.ordinal
                settled = self._settled_ordinals
                if done:
                    break
                continue
            if not commit_time_ms:
                raise MalformedStream("an Insert outside a transaction")
            ordinal += 1
            if ordinal in settled:
                continue
            try:
                topic, value, key, headers = plan(frame, commit_time_ms)
            except (PoisonEvent, MalformedStream) as error:
                self.ordinal = ordinal
                self._put_away(frame, error)
                continue
            except CdcOutboxError:
                self.ordinal = ordinal
                raise
            batch.outstanding += 1
            batch.per_topic[topic] += 1
            try:
                publish(topic, value, key, -1, batch.on_delivery, None, commit_time_ms, headers)
            except (BufferError, refusal) as error:
                self.ordinal = ordinal
                self._publish_or_put_away(frame, Record(topic, value, key, headers), error)
        self.ordinal = ordinal
        if not self.open_commit_lsn:
            self.watermark.close_batch()

    def _publish_or_put_away(self, frame: bytes, record: Record, error: Exception) -> None:
        """An event that has been counted in, and for which there was no room, or which was refused."""
        refused = self._publish_patiently(record, error)
        if isinstance(refused, PoisonEvent):
            self._put_away(frame, refused, topic=record.topic)
        elif refused:
            raise refused

    def _publish_patiently(self, record: Record, error: Exception | None = None) -> OperatorNeeded | None:
        """Publish an event that has been counted in, waiting for room; ``error`` is what a first attempt came to.

        Why it is refused, then it is counted out. What is raised meanwhile is about other events, or none.
        """
        batch = self.watermark.current
        while True:
            error = error or self._try_to_publish(record)
            if error is None:
                return None
            if not isinstance(error, BufferError):
                refused: CdcOutboxError = self._publisher.explain(error, record.topic)
            elif self._wait_for_room():
                error = None
                continue
            else:
                refused = PoisonEvent(
                    "it does not fit into librdkafka's queue",
                    reason="queue_too_small",
                    hint="set kafka.producer.queue.buffering.max.kbytes above the largest payload",
                )
            batch.outstanding -= 1
            batch.per_topic[record.topic] -= 1
            if isinstance(refused, OperatorNeeded):
                return refused
            raise refused

    def _try_to_publish(self, record: Record) -> Exception | None:
        topic, value, key, headers = record
        on_delivery = self.watermark.current.on_delivery
        try:
            self._publisher.publish(topic, value, key, -1, on_delivery, None, self._commit_time_ms, headers)
        except (BufferError, self._publisher.refusal) as error:
            return error
        return None

    def _put_away(self, frame: bytes, error: PoisonEvent | MalformedStream, *, topic: str = "") -> None:
        """Let an event that can never be published become a dead letter, or stop before it.

        ``topic`` is the one that has refused it, if it came so far.
        """
        head = frame[pgoutput.INSERT_HEAD]
        if isinstance(error, MalformedStream):
            error = PoisonEvent(error.message, reason="undecodable", hint=error.hint)
        router = self._router_of[head]
        self._dead_letters.put(
            DeadLetter(
                event=router.describe(self._relations[head], frame, self._commit_time_ms),
                commit_lsn=LSN(self.open_commit_lsn),
                ordinal=self.ordinal,
                commit_time_ms=self._commit_time_ms,
                poison=error,
                refused_by=topic,
                expendable=router.expendable,
            )
        )

    def _redrive(self, request: RedriveRequest) -> None:
        """Publish a dead letter again, as an event of the transaction that asks for it."""
        self.ordinal += 1
        record = self._dead_letters.take(request)
        if record is None:
            return
        batch = self.watermark.current
        refused: OperatorNeeded | None = None
        try:
            self._routers[0].check(record.topic)
        except OperatorNeeded as error:
            refused = error
        else:
            batch.outstanding += 1
            batch.per_topic[record.topic] += 1
            header = (REDRIVEN_HEADER, b"%d" % request.dead_letter_id)
            refused = self._publish_patiently(record._replace(headers=[*record.headers, header]))
        if refused is None:
            batch.redriven.append((request.id, request.dead_letter_id))
            return
        poison = refused if isinstance(refused, PoisonEvent) else PoisonEvent(refused.message, reason="not_writable")
        self._dead_letters.refused_again(request, poison)

    def _control(self, frame: bytes) -> bool:
        """Take in everything but events. True when the pipeline is draining and stands between transactions."""
        if len(frame) <= MESSAGE_START or frame[0] != XLOG_DATA:
            keepalive = read_keepalive(frame)
            self.reply_requested |= keepalive.reply_requested
            self.wal_end = max(self.wal_end, keepalive.wal_end)
            return self.draining and not self.in_transaction
        tag = frame[MESSAGE_START]
        if tag == pgoutput.BEGIN:
            self._begin(frame)
        elif tag == pgoutput.COMMIT:
            self._commit(frame)
            return self.draining
        elif tag == pgoutput.RELATION:
            self._introduce(pgoutput.read_relation(frame, self._encoding))
        elif tag == pgoutput.INSERT:
            self._insert_of_no_event(frame)
        elif tag not in pgoutput.WITHOUT_EVENT:
            raise MalformedStream(f"unsupported pgoutput message {bytes([tag])!r}")
        return False

    def _introduce(self, relation: pgoutput.Relation) -> None:
        head = relation.insert_head
        self._relations[head] = relation
        self._plans[head] = None
        self._refusals.pop(head, None)
        for router in self._routers:
            if plan := router.compile(relation):
                self._plans[head], self._router_of[head] = plan.read, router
        if self._plans[head] is None and (refusal := self._strays.refusal(relation)):
            self._refusals[head] = refusal
        if (relation.namespace, relation.name) == REDRIVE_REQUESTS:
            try:
                self._read_request[head] = compile_insert_reader(relation, _REQUEST_COLUMNS)
            except ValueError:
                self._refusals[head] = OperatorNeeded(
                    f"a request in {relation} comes without one of its columns",
                    hint="let the publication have the table without a column list",
                )

    def _insert_of_no_event(self, frame: bytes) -> None:
        head = frame[pgoutput.INSERT_HEAD]
        if head not in self._plans or not self.in_transaction:
            raise MalformedStream("an Insert into a relation, or with a number of columns, that was not announced")
        if head in self._refusals:
            raise self._refusals[head]
        if head in self._read_request:
            self._redrive(self._request(*self._read_request[head](frame)))

    def _request(
        self, number: bytes, slot: bytes, dead_letter_id: bytes, topic: bytes | None, key: bytes | None
    ) -> RedriveRequest:
        text = self._encoding.text
        return RedriveRequest(
            int(number),
            text(slot),
            int(dead_letter_id),
            None if topic is None else text(topic),
            None if key is None else text(key).encode(),
        )

    def _begin(self, frame: bytes) -> None:
        if self.open_commit_lsn:
            raise MalformedStream(f"a Begin inside the transaction that commits at {LSN(self.open_commit_lsn)}")
        self.open_commit_lsn, self._commit_time_ms = pgoutput.read_begin(frame)
        self.last_commit_lsn = self.open_commit_lsn
        self.ordinal = 0
        self._settled_ordinals = self._dead_letters.settled_ordinals(self.open_commit_lsn)
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
        batch.events += self.ordinal
        self._committed_events += self.ordinal
        if batch.events >= BATCH_EVENTS:
            self.watermark.close_batch()
