"""A session: one replication stream and one producer, from START_REPLICATION to a clean end or an error.

This is the loop that reads, publishes, polls, settles and confirms, and the only place where the relay waits. What is
decided lies in `relay`; what happens after an error, in `service.relay`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Final

from cdc_outbox.errors import BatchRefused, CdcOutboxError, OperatorNeeded, PoisonEvent, SourceUnavailable
from cdc_outbox.kafka.delivery import Delivery
from cdc_outbox.kafka.isolation import Isolation
from cdc_outbox.postgres.stream import ReplicationStream
from cdc_outbox.relay.pipeline import Pipeline
from cdc_outbox.relay.requests import RedriveRequest, Request
from cdc_outbox.relay.stops import (
    Denied,
    Drained,
    Dry,
    Full,
    NewTopic,
    Parking,
    RedriveRefused,
    Requested,
    Stop,
)
from cdc_outbox.service.health import Health
from cdc_outbox.service.logs import get_logger
from cdc_outbox.service.parking import Parker
from cdc_outbox.service.phases import Phase
from cdc_outbox.service.shutdown import Shutdown
from cdc_outbox.wal.lsn import LSN
from cdc_outbox.wal.position import Position

#: Under load requests fill for librdkafka's linger; when the input has run dry, a flush this long sends at once what
#: lingers and usually sees it acknowledged. Shorter does not reach librdkafka's broker thread in time.
_FLUSH_SECONDS: Final = 0.002
#: How soon after the watermark moved the server is told: the bound of what a crash resends beyond what is in flight.
_CONFIRM_AFTER_SECONDS: Final = 0.02
#: How often the server hears from us at least; its own patience (wal_sender_timeout, see stream.py) is 10 s.
_STATUS_EVERY_SECONDS: Final = 2.0
#: How often standbys are looked at, while a confirmation waits for them; how long a stop waits; when it is not ready.
_LOOK_AGAIN_SECONDS: Final = 0.05
_STANDBYS_AT_STOP_SECONDS: Final = 2.0
_STANDBYS_NOT_READY_SECONDS: Final = 8.0
#: A server silent for so long is asked to answer; then the relay is not ready, and asks on a fresh connection whether
#: the stream is still there; then it is given up, whatever it is.
_SILENCE_ASKED_SECONDS: Final = 4.0
_SILENCE_NOT_READY_SECONDS: Final = 8.0
_SILENCE_GIVEN_UP_SECONDS: Final = 60.0
#: Events in flight without a single acknowledgement for so long: not ready.
_STALL_SECONDS: Final = 8.0
#: The longest sleep with nothing to do, and with deliveries to be collected.
_IDLE_WAIT_SECONDS: Final = 1.0
_DELIVERY_WAIT_SECONDS: Final = 0.005
#: How long the server may take to answer the end of the stream.
_END_SECONDS: Final = 3.0
#: How long Kafka may take to acknowledge what came before an event that cannot be published.
_LAST_DRAIN_SECONDS: Final = 5.0
_STANDBYS_LACK: Final = "a standby of synchronized_standby_slots does not have what was written for an event"
#: How often health is looked at.
_HEALTH_EVERY_SECONDS: Final = 0.25


class _DeadlinePassed(Exception):
    """The time for a clean end is up."""


class Session:
    """Raises from ``run`` whatever ends a session other than a requested shutdown."""

    def __init__(
        self,
        stream: ReplicationStream,
        delivery: Delivery,
        pipeline: Pipeline,
        parker: Parker,
        require_topic: Callable[[str], None],
        shutdown: Shutdown,
        health: Health,
    ) -> None:
        """``require_topic`` raises if a topic is not there."""
        self._stream = stream
        self._delivery = delivery
        self._parker = parker
        self._journal = parker.journal
        self._require_topic = require_topic
        self._pipeline = pipeline
        self._watermark = self._pipeline.watermark
        self._shutdown = shutdown
        self._health = health
        self._metrics = health.metrics
        # What was settled by rows of an earlier session is passed over: standbys must have those rows, too.
        self._watermark.current.written_lsn = self._journal.written_lsn
        now = time.monotonic()
        self._sent_lsn = LSN(0)
        self._sent_at = 0.0
        self._acknowledged = 0
        self._acknowledged_at = now
        self._health_at = now
        #: up to this event (see `reached`) each is published alone
        self.suspected: Position | None = None
        self._isolation: Isolation | None = None
        #: events were settled since the last status update
        self._carried = False
        #: since when what is to be confirmed next waits for standbys, monotonic seconds; None if it does not
        self._waits_for_standbys_since: float | None = None
        self._looked_at_standbys_at = 0.0

    def suspect(self, reached: Position, isolation: Isolation) -> None:
        """Among the events up to ``reached`` is one that the broker refuses: publish them one by one to find it."""
        self.suspected, self._isolation = reached, isolation
        self._pipeline.publish_one_by_one()

    @property
    def reached(self) -> Position:
        return self._pipeline.reached

    def run(self) -> None:
        """Relay until shutdown is requested, then drain: return when everything read is confirmed, or time is up."""
        stream, delivery = self._stream, self._delivery
        stream.watch(self._shutdown.descriptor)
        try:
            while not self._may_stop_reading():
                if self._isolation is None:
                    self._feed(stream.frames())
                else:
                    self._feed_one(self._isolation)
                delivery.poll(0)
                self._settle()
                self._report(time.monotonic())
                if not stream.receive():
                    self._input_ran_dry()
            self._drain(self._shutdown.seconds_left)
        except _DeadlinePassed:
            pass
        except (OperatorNeeded, BatchRefused):
            self._settle_what_came_before()
            raise
        self._send_last_status()

    @property
    def _phase(self) -> Phase:
        """While both sides go on."""
        if self._shutdown.requested:
            return Phase.DRAINING
        return Phase.ISOLATING if self._isolation else Phase.READING

    @property
    def unacknowledged_events(self) -> int:
        return self._watermark.outstanding

    def _feed(self, frames: Iterator[bytes]) -> None:
        """Until they run dry, or the pipeline is drained; doing what it stops for meanwhile."""
        while True:
            stop = self._pipeline.feed(frames)
            if batch := self._pipeline.close_batch():
                self._delivery.close_batch(batch)
            if isinstance(stop, Dry | Drained):
                return
            self._act_on(stop)

    def _act_on(self, stop: Stop) -> None:
        match stop:
            case Full():
                self._make_room()
            case NewTopic(topic):
                self._look_for(topic)
            case Requested(request):
                self._parker.flush()  # a request is carried out behind all that came before it
                self._carry_out(request)
            case Parking():
                self._parker.park(stop)
            case Denied():
                self._parker.deny(stop)
            case RedriveRefused():
                self._parker.refuse(stop)
        if isinstance(stop, Parking | Requested | RedriveRefused):
            self._watermark.current.written_lsn = self._journal.written_lsn

    def _carry_out(self, request: Request) -> None:
        if isinstance(request, RedriveRequest):
            if letter := self._parker.take(request):
                self._pipeline.redrive(request, letter)
        elif (gates := self._parker.activate(request, self._pipeline.reached)) is not None:
            self._count_watched()
            self._pipeline.govern(gates)
            self._metrics.policy_in_force(gates.policy.sha256)

    def _count_watched(self) -> None:
        if self._pipeline.gates:
            self._metrics.watched(self._pipeline.gates)

    def _make_room(self) -> None:
        """Wait until less is in flight. If nothing is, no room will come."""
        self._check_deadline()
        if self._delivery.in_flight:
            self._wait_a_moment()
            return
        self._act_on(
            self._pipeline.refuse(
                PoisonEvent(
                    "it does not fit into librdkafka's queue",
                    reason="queue_too_small",
                    hint="set kafka.producer.queue.buffering.max.kbytes above the largest payload",
                )
            )
        )

    def _look_for(self, topic: str) -> None:
        try:
            self._require_topic(topic)
        except OperatorNeeded as error:
            self._act_on(self._pipeline.refuse(error))
        else:
            self._pipeline.admit(topic)

    def _feed_one(self, isolation: Isolation) -> None:
        """One frame at a time, until all that is suspected has been published alone; then in batches again."""
        self._feed(islice(self._stream.frames(), 1))
        while not isolation.is_settled():
            self._wait_a_moment()
        if isolation.refusal:
            refusal, isolation.refusal = isolation.refusal, None
            self._act_on(self._pipeline.withdraw(refusal))
        if self.suspected is None or self._pipeline.reached >= self.suspected:
            self._end_isolation(isolation)

    def _end_isolation(self, isolation: Isolation) -> None:
        self.suspected = self._isolation = None
        self._pipeline.publish_in_batches()
        self._delivery.publish_in_batches()
        if not isolation.refused:
            get_logger().warning(
                "refused_only_together",
                reason="Kafka refused a batch of events, and none of them alone",
                hint="set kafka.producer.batch.size below the smallest max.message.bytes of the topics",
            )

    def _may_stop_reading(self) -> bool:
        """On shutdown, read on to the end of the transaction at hand: stopping inside one would resend its head."""
        if not self._shutdown.requested:
            return False
        self._stream.unwatch()  # it stays readable: from here on only the stream is waited for
        self._check_deadline()
        self._pipeline.draining = True
        return not self._pipeline.in_transaction

    def _input_ran_dry(self) -> None:
        self._parker.flush()
        if self._delivery.in_flight:
            self._delivery.flush(_FLUSH_SECONDS)
        self._settle()
        now = time.monotonic()
        self._report(now)
        self._stream.wait(self._seconds_to_wait(now))

    def _seconds_to_wait(self, now: float) -> float:
        if self._delivery.in_flight:
            return _DELIVERY_WAIT_SECONDS
        if self._waits_for_standbys_since is not None:
            return _LOOK_AGAIN_SECONDS
        if self._watermark.settled_lsn > self._sent_lsn:
            return max(0.0, self._sent_at + _CONFIRM_AFTER_SECONDS - now)
        return _IDLE_WAIT_SECONDS

    def _wait_a_moment(self) -> None:
        """For Kafka, without reading on."""
        self._check_deadline()
        self._delivery.poll(0.05)
        self._settle()
        self._stream.heard_at = time.monotonic()  # not listening is not silence
        self._report(self._stream.heard_at)

    def _drain(self, timeout_seconds: float) -> None:
        """Wait until nothing is in flight, at most ``timeout_seconds``; and for a moment until standbys have all."""
        deadline = time.monotonic() + timeout_seconds
        while self._delivery.in_flight and (left := deadline - time.monotonic()) > 0:
            self._delivery.flush(min(0.1, left))
            self._settle()
            self._report(time.monotonic())
        self._parker.flush()
        self._settle()
        deadline = min(deadline, time.monotonic() + _STANDBYS_AT_STOP_SECONDS)
        while self._waits_for_standbys_since is not None and time.monotonic() < deadline:
            self._delivery.poll(_LOOK_AGAIN_SECONDS)
            self._settle()
        if self._waits_for_standbys_since is not None:
            get_logger().warning("not_confirmed", reason=_STANDBYS_LACK, hint="what is not confirmed is sent again")

    def _settle_what_came_before(self) -> None:
        """After trouble with an event: confirm what came before it, so that it is not sent again."""
        with suppress(CdcOutboxError):  # the trouble itself, again
            if batch := self._watermark.close_batch():
                self._delivery.close_batch(batch)
        deadline, left = time.monotonic() + _LAST_DRAIN_SECONDS, float("inf")
        while self._delivery.in_flight < left:
            left = self._delivery.in_flight
            with suppress(CdcOutboxError):  # each report that fails with it raises, and others come behind
                self._drain(deadline - time.monotonic())
                break
        with suppress(CdcOutboxError):
            self._send_last_status()

    def _check_deadline(self) -> None:
        if not self._shutdown.seconds_left:
            raise _DeadlinePassed

    def _settle(self) -> None:
        """Let the watermark move over what is settled, or over what the server skipped while we idle."""
        self._parker.flush_if_due()
        for batch in self._watermark.advance():
            if batch.redriven:
                self._journal.redriven(batch.redriven)
                batch.redriven, batch.written_lsn = [], self._journal.written_lsn
            if batch.written_lsn and not self._standbys_have(batch.written_lsn):
                break
            self._metrics.batch_settled(batch)
            self._carried |= batch.events > 0
        if not self._pipeline.in_transaction:
            self._watermark.advance_idle(self._pipeline.wal_end)

    def _standbys_have(self, lsn: LSN) -> bool:
        now = time.monotonic()
        if now < self._looked_at_standbys_at + _LOOK_AGAIN_SECONDS:
            return False
        if self._journal.standbys_have(lsn):
            self._waits_for_standbys_since, self._looked_at_standbys_at = None, 0.0
            return True
        self._looked_at_standbys_at = now
        self._waits_for_standbys_since = self._waits_for_standbys_since or now
        return False

    def _report(self, now: float) -> None:
        """Tell the server what is due, and health and metrics every now and then."""
        moved = self._watermark.settled_lsn > self._sent_lsn
        since = now - self._sent_at
        if (
            self._pipeline.reply_requested
            or (moved and since >= _CONFIRM_AFTER_SECONDS)
            or since >= _STATUS_EVERY_SECONDS
        ):
            self._send_status()
        if now >= self._health_at:
            self._health_at = now + _HEALTH_EVERY_SECONDS
            self._watch_health(now)

    def _send_last_status(self) -> None:
        self._count_watched()
        self._send_status(last=True)
        self._stream.end(_END_SECONDS)

    def _send_status(self, *, last: bool = False) -> None:
        now = time.monotonic()
        silent = now - self._stream.heard_at > _SILENCE_ASKED_SECONDS
        self._journal.confirming(self._watermark.settled_lsn, carried=self._carried, last=last)
        self._carried = False
        self._sent_lsn = self._watermark.settled_lsn
        self._stream.send_status(self._sent_lsn, request_reply=silent)
        self._sent_at = now
        self._pipeline.reply_requested = False
        self._health.confirmed_lsn = self._sent_lsn

    def _watch_health(self, now: float) -> None:
        self._health.beat()
        outstanding, acknowledged = self._watermark.outstanding, self._pipeline.acknowledged_events
        self._metrics.events_in_flight.set(outstanding)
        self._metrics.watch_oldest(self._watermark.oldest_commit_time_ms)
        self._count_watched()
        if not outstanding or acknowledged != self._acknowledged:
            self._acknowledged, self._acknowledged_at = acknowledged, now
        if (alarm := self._health.alarm) is not None:  # read once: the monitor's thread takes it back
            raise alarm
        silence = now - self._stream.heard_at
        if silence > _SILENCE_GIVEN_UP_SECONDS:
            raise SourceUnavailable(f"the server has been silent for {silence:.0f} s")
        self._delivery.probe()
        if self._delivery.unreachable:
            self._health.become(Phase.STALLED, f"no broker can be reached: {self._delivery.unreachable}")
        elif now - self._acknowledged_at > _STALL_SECONDS:
            self._health.become(Phase.STALLED, "Kafka acknowledges nothing")
        elif now - (self._waits_for_standbys_since or now) > _STANDBYS_NOT_READY_SECONDS:
            self._health.become(Phase.STALLED, _STANDBYS_LACK)
        elif silence > _SILENCE_NOT_READY_SECONDS:
            self._health.become(Phase.STALLED, "the PostgreSQL server does not answer")
            self._health_at = now + _STATUS_EVERY_SECONDS  # what follows is a connection each time
            if self._stream.is_given_up():
                raise SourceUnavailable("the server has ended the replication stream, unheard")
        else:
            self._health.become(self._phase)
