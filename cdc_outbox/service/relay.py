"""The relay of one slot: one session after another until somebody asks to stop or an operator is needed.

The one place that decides what is tried again. After any failure decoder, watermark *and producer* are thrown away, and
everything starts from the slot: then a late delivery report confirms nothing, and no old record passes a replayed one.
"""

import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Final

from cdc_outbox.config import Config
from cdc_outbox.errors import (
    BatchRefused,
    CdcOutboxError,
    ConfigurationError,
    OperatorNeeded,
    ServerStopping,
    SlotInUse,
    TopicRefused,
    UnavailableError,
)
from cdc_outbox.extras import install_hint
from cdc_outbox.journal import policies
from cdc_outbox.journal.continuity import Continuity
from cdc_outbox.journal.journal import Journal, NoJournal
from cdc_outbox.kafka.acknowledged import AcknowledgedDelivery, unwrapped
from cdc_outbox.kafka.opening import Produce
from cdc_outbox.kafka.topics import Topics
from cdc_outbox.postgres.connection import BoundedConnection, Connection, connect_bounded
from cdc_outbox.postgres.monitor import Monitor
from cdc_outbox.postgres.publication import SentTable
from cdc_outbox.postgres.server import check_same_server
from cdc_outbox.postgres.slots import check_slot
from cdc_outbox.postgres.stream import ReplicationStream
from cdc_outbox.relay.pipeline import Pipeline
from cdc_outbox.relay.router import Routing
from cdc_outbox.relay.topic_template import TopicTemplate
from cdc_outbox.service.canary import Canary, make_canary_router
from cdc_outbox.service.health import Health
from cdc_outbox.service.logs import get_logger
from cdc_outbox.service.metrics import Metrics
from cdc_outbox.service.parking import Parker
from cdc_outbox.service.phases import Phase
from cdc_outbox.service.preflight import Route, check_outbox, prepare_route
from cdc_outbox.service.session import Session
from cdc_outbox.service.shutdown import Shutdown, ShutdownRequested

if TYPE_CHECKING:
    from cdc_outbox.wal.position import Position

#: How often a standby asks for the slot.
_STANDBY_SECONDS: Final = 0.5
_FIRST_BACKOFF_SECONDS: Final = 0.1
_LONGEST_BACKOFF_SECONDS: Final = 3.0
#: A session that lasted so long was a good one: the next trouble is a new one.
_GOOD_SESSION_SECONDS: Final = 10.0
_MONITOR_SECONDS: Final = 5.0
_MONITOR_RETRY_SECONDS: Final = 1.0


class Relay:
    """Raises ConfigurationError from the constructor, before anything is connected."""

    def __init__(self, config: Config, shutdown: Shutdown, metrics: Metrics) -> None:
        self._config = config
        self._dsn = config.postgres.dsn.get_secret_value()
        self._bootstrap_servers = config.kafka.require_bootstrap_servers()
        self._topic = TopicTemplate(config.kafka.topic, config.kafka.topic_pattern)
        self._shutdown = shutdown
        self._metrics = metrics
        self.health = Health(config.postgres.slot, metrics)
        self._monitor = Monitor(
            self._dsn,
            slot=config.postgres.slot,
            check=lambda connection: check_outbox(config, connection, self._topic),
        )
        canary = config.canary
        self._canary = Canary(canary.every_seconds, canary.topic, self._monitor, self.health, self._metrics)
        self._log = get_logger()
        self._continuity = Continuity(config.postgres.slot)
        #: topics that have been there while this process ran
        self._topics_seen: set[str] = set()
        #: after a refusal by the broker: up to where the refused event must be, see `Session.suspect`
        self._suspected: Position | None = None
        self._failures = 0
        self._streaming_since = float("inf")
        self._wrap = _wrap_publish(config)
        # A first producer at once: librdkafka checks its settings, and connects while PostgreSQL is connected to.
        self._next_delivery: AcknowledgedDelivery | None = self._make_delivery()

    def run(self) -> None:
        """Returns when a shutdown was requested; raises what only an operator can fix."""
        threading.Thread(target=self._look_again_and_again, name="monitor", daemon=True).start()
        while not self._shutdown.requested:
            try:
                self._serve()
            except ShutdownRequested:
                break
            except UnavailableError as error:
                self._recover(error)
            except CdcOutboxError as error:
                if isinstance(error, TopicRefused) and self._canary.give_up(error):
                    continue  # without canaries
                self.health.remember(error)
                self.health.become(Phase.HALTED, error.message)
                raise
        self._log.info("stopped", confirmed_lsn=str(self.health.confirmed_lsn))

    def _serve(self) -> None:
        """One attempt: connect, check, take the slot, relay."""
        delivery = self._next_delivery or self._make_delivery()
        self._next_delivery = None
        with ExitStack() as stack:
            stack.callback(delivery.close)
            with self._shutdown.interrupting():
                connection = stack.enter_context(closing(connect_bounded(self._dsn)))
                stream = stack.enter_context(ReplicationStream(self._dsn))
                check_same_server(connection, stream.identify())
                route, topics = self._prepare(connection, delivery)
                if self._take_slot(connection, stream, delivery):
                    route, topics = self._prepare(connection, delivery)
                journal = self._make_journal(connection, stream, route.sent)
            self._streaming_since = time.monotonic()
            self.health.become(Phase.READING)
            self._relay(stream, delivery, topics, route.routing, journal)

    def _prepare(self, connection: Connection, delivery: AcknowledgedDelivery) -> tuple[Route, Topics]:
        """See that all is there that streaming needs. Raises what says why not."""
        config = self._config
        topics = Topics(delivery, create=config.kafka.create_topics, ever_seen=self._topics_seen)
        route = prepare_route(config, connection, self._topic)
        check_slot(connection, config.postgres.slot)
        # A relay that cannot reach Kafka must not keep the slot from one that can.
        topics.connect()
        if not self._topic.fields:
            topics.require(self._topic.text)
        if self._canary.prepare(topics):
            route = route.also(make_canary_router(config))
        return route, topics

    def _take_slot(self, connection: Connection, stream: ReplicationStream, delivery: AcknowledgedDelivery) -> bool:
        """Wait for the slot, as a standby while another relay has it; whether that was so.

        What was looked at before may be old by then: partitions and topics come and go, tables are created again.
        """
        while True:
            self._continuity.check(connection, stream.identify())
            try:
                postgres = self._config.postgres
                stream.start(postgres.slot, postgres.publication, start_lsn=self._continuity.start_lsn)
            except SlotInUse:
                self.health.become(Phase.STANDBY, "another relay holds the slot; waiting for it")
                delivery.poll(0)  # librdkafka's notices are not to pile up
                self._shutdown.sleep(_STANDBY_SECONDS)
            else:
                return self.health.phase is Phase.STANDBY

    def _relay(
        self,
        stream: ReplicationStream,
        delivery: AcknowledgedDelivery,
        topics: Topics,
        routing: Routing,
        journal: Journal | NoJournal,
    ) -> None:
        parker = Parker(journal, self._metrics, keeps=self._config.relay.on_poison == "dead-letter")
        session = Session(
            stream,
            delivery,
            Pipeline(routing, delivery, journal.settled, started_at=journal.started_at, gates=journal.gates),
            parker,
            topics.require_for_event,
            self._shutdown,
            self.health,
        )
        self._metrics.policy_in_force(None if journal.gates is None else journal.gates.policy.sha256)
        if self._suspected:
            session.suspect(self._suspected, delivery.isolate())
        try:
            session.run()
        except BatchRefused:
            self._suspected = session.reached
            raise
        except CdcOutboxError:
            self._suspected = session.suspected
            raise
        if session.unacknowledged_events:
            self._log.warning(
                "shutdown_deadline_passed",
                unacknowledged_events=session.unacknowledged_events,
                hint="they are not lost: the slot keeps them, the next start publishes them",
            )

    def _make_journal(
        self, connection: BoundedConnection, stream: ReplicationStream, sent: SentTable
    ) -> Journal | NoJournal:
        config = self._config
        if self._continuity.is_noted:
            return Journal(
                connection,
                self._continuity,
                slot=check_slot(connection, config.postgres.slot),
                started_at=self._continuity.start_lsn,
                sent=sent,
                walsender_pid=stream.backend_pid,
            )
        trouble = "schema cdc_outbox is not installed, or this role has no right to it"
        hint = "run `cdc-outbox migrate up`, and GRANT cdc_outbox_relay to a role of your own"
        if config.relay.on_poison == "dead-letter":
            raise OperatorNeeded(f'relay.on_poison = "dead-letter", but {trouble}', hint=hint)
        if policies.may_govern(connection):
            raise OperatorNeeded("this role cannot read which policy is in force: nothing may be published", hint=hint)
        self._log.warning("gaps_not_noticed", reason=f"{trouble}: a slot created again would not be noticed", hint=hint)
        return NoJournal()

    def _recover(self, error: UnavailableError) -> None:
        """Wait before the next attempt: longer each time, and not in step with other relays."""
        self.health.alarm = None
        self.health.remember(error)
        self.health.become(Phase.BACKOFF, error.message)
        self._metrics.reconnects.labels(error.side).inc()
        if time.monotonic() - self._streaming_since > _GOOD_SESSION_SECONDS:
            self._failures = 0
        self._streaming_since = float("inf")
        if isinstance(error, BatchRefused):
            return  # nothing to wait for: the next session finds the event
        backoff_seconds = min(_LONGEST_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2**self._failures)
        self._failures = min(self._failures + 1, 10)
        self._shutdown.sleep(backoff_seconds * random.uniform(0.5, 1.0))  # noqa: S311 - jitter is not cryptography

    def _make_delivery(self) -> AcknowledgedDelivery:
        return AcknowledgedDelivery(
            self._bootstrap_servers,
            self._config.kafka.producer,
            max_in_flight=self._config.relay.max_in_flight,
            count_failure=self._metrics.publish_failed,
            wrap=self._wrap,
        )

    def _look_again_and_again(self) -> None:
        """The monitor's thread: slot figures for the metrics, and an alarm for what the stream does not say."""
        with self._monitor as monitor:
            while not self._shutdown.requested:
                try:
                    self._metrics.slot_seen(monitor.look())
                    self.health.alarm = None
                    seconds = min(_MONITOR_SECONDS, self._canary.plant_when_due())
                    monitor.wait(seconds, wake_descriptor=self._shutdown.descriptor)
                except Exception as error:  # noqa: BLE001 - whatever it is, the next look must not be missing
                    self._metrics.slot_seen(None)
                    self._could_not_look(error)
                    self._shutdown.sleep(_MONITOR_RETRY_SECONDS)

    def _could_not_look(self, error: Exception) -> None:
        if isinstance(error, OperatorNeeded | ServerStopping):
            self.health.alarm = error
        elif isinstance(error, CdcOutboxError):
            self._log.debug("slot_not_seen", reason=error.message)
        else:
            self._log.error("monitor_failed", exc_info=error)


def _wrap_publish(config: Config) -> Callable[[Produce], Produce]:
    """What stands around the hot call: nothing, or tracing.

    Raises ConfigurationError if tracing is asked for and its libraries are not there.
    """
    if not config.tracing.enabled:
        return unwrapped
    try:
        from cdc_outbox.kafka.tracing import start_tracing, traced
    except ImportError as error:
        raise ConfigurationError(
            f"tracing.enabled, but {error.name} is not installed", hint=install_hint("otel")
        ) from error
    return traced(start_tracing())
