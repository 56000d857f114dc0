"""Delivery by acknowledgement: an idempotent producer that keeps the relay's promises, or says why it cannot.

Translates everything librdkafka reports into the tree of errors.py.
Source: librdkafka's CONFIGURATION.md and INTRODUCTION.md ("Idempotent Producer").
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from cdc_outbox.errors import (
    BatchRefused,
    BrokenInvariant,
    BrokerUnavailable,
    CdcOutboxError,
    ConfigurationError,
    OperatorNeeded,
)
from cdc_outbox.kafka.isolation import Isolation
from cdc_outbox.kafka.opening import Opening, Produce
from cdc_outbox.kafka.refusals import Verdict, denies_us, explain, verdict_on
from cdc_outbox.relay.watermark import Batch

ProducerSettings = Mapping[str, str | int | float | bool]

#: What the promises rest on. Each is refused as a setting, with its reason.
_PROMISES: Final[dict[str, str | int | bool]] = {
    "acks": "all",  # an LSN is confirmed only after every in-sync replica has the event
    "enable.idempotence": True,  # a retry neither duplicates nor reorders
    "enable.gapless.guarantee": True,  # a refused event is fatal, so that nothing of its key passes it (see `opening`)
    "message.timeout.ms": 0,  # wait (and let PostgreSQL keep the WAL) rather than punch a hole
    "partitioner": "murmur2_random",  # the partition a Java producer would choose
    "allow.auto.create.topics": False,  # topics are checked, or created by kafka.create_topics
}

_REFUSED: Final[Mapping[str, str]] = {
    **{key: f"it is {value!r}, a promise rests on it" for key, value in _PROMISES.items()},
    "request.required.acks": "acks is 'all', a promise rests on it",
    "delivery.timeout.ms": "events wait for the broker as long as it takes, a promise rests on it",
    "message.send.max.retries": "events are tried until they are acknowledged, a promise rests on it",
    "retries": "events are tried until they are acknowledged, a promise rests on it",
    "delivery.report.only.error": "confirming rests on every delivery report",
    "transactional.id": "the relay does not use transactions",
    "queue.buffering.max.messages": "use relay.max_in_flight",
    "bootstrap.servers": "use kafka.bootstrap_servers",
    "metadata.broker.list": "use kafka.bootstrap_servers",
}

#: Free to change. The linger is what fills requests under load; the session cuts it short when the input runs dry.
_DEFAULTS: Final[dict[str, str | int | bool]] = {
    "client.id": "cdc-outbox",
    "linger.ms": 5,
    "compression.type": "lz4",
    # a broker that is back is found within a second, not ten
    "reconnect.backoff.max.ms": 1000,
    # a connection on which nothing comes back any more is given up in a quarter of a minute, not in a whole one
    "socket.timeout.ms": 15_000,
    # a topic that was deleted is given up in ten seconds, not in thirty: it was seen to exist before
    "topic.metadata.propagation.max.ms": 10_000,
    # what is in flight is bounded in bytes too, so that large payloads do not cost memory by their number
    "queue.buffering.max.kbytes": 32 * 1024,
}

#: For one event at a time: nothing can pass a refused one then, and the producer need not die of it.
_ALONE: Final[dict[str, str | int | bool]] = {"enable.gapless.guarantee": False, "linger.ms": 0}

#: How long the brokers may take to tell a topic's partitions.
_METADATA_SECONDS: Final = 5.0
#: How long a broker may take to answer a probe, and the report of what killed a producer to be served.
_PROBE_SECONDS: Final = 0.5
_REPORT_SECONDS: Final = 0.5
#: Of a producer that is dead: a request in flight may come back into the queue, to be sent again.
_PURGE_EVERY_SECONDS: Final = 0.05

#: What a probe asks about. Nobody needs such a topic: that there is none is an answer, too.
_PROBED_TOPIC: Final = "cdc-outbox.probe"


def unwrapped(produce: Produce) -> Produce:
    """Nothing stands around the hot call."""
    return produce


class AcknowledgedDelivery:
    """One producer. After any failure it is closed and another one takes its place: an old record can then not
    overtake a replayed one.

    Raises ConfigurationError if librdkafka does not accept ``settings``.
    """

    refusal: type[Exception] = KafkaException

    def __init__(
        self,
        bootstrap_servers: str,
        settings: ProducerSettings,
        *,
        max_in_flight: int,
        count_failure: Callable[[str, str], None] = lambda _topic, _reason: None,
        wrap: Callable[[Produce], Produce] = unwrapped,
    ) -> None:
        """``wrap`` puts something around the hot call, as `kafka.tracing` does."""
        self._bootstrap_servers = bootstrap_servers
        self._count_failure = count_failure
        self._wrap = wrap
        _refuse_broken_promises(settings)
        self.client_settings: dict[str, Any] = {
            **_DEFAULTS,
            **settings,
            **_PROMISES,
            "bootstrap.servers": bootstrap_servers,
            "queue.buffering.max.messages": max_in_flight,
            "error_cb": self._on_error,
            "logger": logging.getLogger("librdkafka"),  # else it writes to standard error, past our logs
        }
        try:
            self.producer = Producer(self.client_settings)
        except KafkaException as error:
            reason = error.args[0].str()
            raise ConfigurationError(f"kafka.producer: {reason}", hint="see librdkafka's CONFIGURATION.md") from error
        self._produce: Produce = wrap(self.producer.produce)
        self._opening = Opening(self._produce)
        self._isolation: Isolation | None = None
        self._is_dead = False
        self._purge_at = 0.0
        #: how many partitions each topic has: as the cluster said last, and of those that events go to
        self._partitions: dict[str, int] = {}
        self._begun: dict[str, int] = {}
        #: why no broker can be reached at the moment; None while one can
        self.unreachable: str | None = None
        #: what librdkafka last complained of, until a broker has answered again
        self._trouble: str | None = None
        self._denied: OperatorNeeded | None = None

    @property
    def publish(self) -> Produce:
        """The hot call: nothing between the pipeline and librdkafka, once all partitions are open."""
        if self._isolation:
            return self._isolation.publish
        return self._produce if self._opening.is_done else self._opening.publish

    def begin_topic(self, topic: str) -> None:
        """Before its first event: see that nothing passes it, see `opening`. Raises BrokerUnavailable."""
        # As at the session's start, if it was there: no broker need answer now.
        self._begun[topic] = self._partitions.get(topic) or self._count_partitions(topic)
        self._opening.add(topic, self._begun[topic])

    def _count_partitions(self, topic: str) -> int:
        try:
            partitions = self.producer.list_topics(topic, timeout=_METADATA_SECONDS).topics[topic].partitions
        except KafkaException as error:
            raise BrokerUnavailable(f"no broker answers about topic {topic}: {error.args[0].str()}") from error
        if not partitions:
            raise BrokerUnavailable(f"the brokers do not know the partitions of topic {topic} yet")
        return len(partitions)

    @property
    def in_flight(self) -> int:
        """Events handed over whose delivery report was not served yet, and librdkafka's notices that were not."""
        return len(self.producer)

    def close_batch(self, batch: Batch) -> None:
        """Each of its events has a delivery report of its own."""

    def poll(self, timeout_seconds: float) -> None:
        """Serve delivery reports, waiting for the first at most ``timeout_seconds``. Raises what a failed one means."""
        self._serve(self.producer.poll, timeout_seconds)

    def flush(self, timeout_seconds: float) -> None:
        """Send what lingers and serve its reports, waiting at most ``timeout_seconds``. Raises as ``poll`` does."""
        self._serve(self.producer.flush, timeout_seconds)

    def _serve(self, serve: Callable[[float], int], timeout_seconds: float) -> None:
        if self._is_dead and time.monotonic() >= self._purge_at:
            # what it has not sent, or would send again, it keeps for ever
            self.producer.purge(in_queue=True, in_flight=False, blocking=False)
            self._purge_at = time.monotonic() + _PURGE_EVERY_SECONDS
        try:
            serve(timeout_seconds)
        except KafkaException as error:  # fatal: the producer is dead, and says so here instead of to `error_cb`
            raise self.explain(error, "any") from error
        if self._denied:
            raise self._denied

    def isolate(self) -> Isolation:
        """From now on events are published one at a time, through what this returns. Nothing may be in flight."""
        self._replace_producer(_ALONE)
        self._isolation = Isolation(self._produce, self._count_failure)
        return self._isolation

    def publish_in_batches(self) -> None:
        """The end of ``isolate``."""
        self._replace_producer({})
        self._isolation = None

    def _replace_producer(self, settings: ProducerSettings) -> None:
        self.producer.purge(in_queue=True, in_flight=True, blocking=False)
        self.producer = Producer({**self.client_settings, **settings})
        self._produce = self._wrap(self.producer.produce)
        self._opening, self._is_dead = Opening(self._produce), False
        for topic, partitions in self._begun.items():
            self._opening.add(topic, partitions)

    def connect(self, timeout_seconds: float) -> dict[str, int]:
        """See that a broker answers; return its topics, and how many partitions each has.

        Raises BrokerUnavailable, OperatorNeeded.
        """
        try:
            topics = self.producer.list_topics(timeout=timeout_seconds).topics
        except KafkaException as error:
            self.poll(0)
            reason = self._trouble or error.args[0].str()
            raise BrokerUnavailable(f"no broker answers at {self._bootstrap_servers}: {reason}") from error
        self._trouble = self.unreachable = None
        self._partitions = {name: len(metadata.partitions) for name, metadata in topics.items()}
        return self._partitions

    def probe(self) -> None:
        """If librdkafka complained, find out whether any broker answers; one of several that fails is no trouble."""
        if self._trouble:
            try:
                self.producer.list_topics(_PROBED_TOPIC, timeout=_PROBE_SECONDS)
            except KafkaException:
                self.unreachable = self._trouble
            else:
                self._trouble = self.unreachable = None

    def close(self) -> None:
        """Forget what is still queued, and end librdkafka's threads now rather than when the collector runs."""
        self.producer.purge(in_queue=True, in_flight=True, blocking=False)
        self._produce, self._isolation = _closed, None  # the hot call holds the producer, too
        self._opening = Opening(_closed)
        del self.producer

    def explain(self, refusal: Any, topic: str) -> CdcOutboxError:
        """What a refused call means. If an earlier event was the cause, raises what that one's report means."""
        error: KafkaError = refusal.args[0]
        if error.fatal():
            self._is_dead = True
            self.poll(_REPORT_SECONDS)
        self._count_failure(topic, error.name())
        return explain(error, topic, alone=self._isolation is not None)

    def on_failure(self, error: KafkaError, message: Message) -> None:
        """Raise what a failed delivery report means; surfaces from ``poll`` and ``flush``.

        A report does not name the culprit, only its batch, unless nothing of that topic can be published: BatchRefused.
        """
        topic = message.topic() or ""
        if error.code() != KafkaError._PURGE_QUEUE:  # noqa: SLF001 - what we have taken back nobody has refused
            self._count_failure(topic, error.name())
        if verdict_on(error) is Verdict.OPERATOR:
            raise explain(error, topic, alone=False)
        self._is_dead = True
        raise BatchRefused(f"topic {topic} refuses an event, or one sent with it: {error.name()}")

    def _on_error(self, error: KafkaError) -> None:
        if denies_us(error):
            self._denied = OperatorNeeded(
                f"Kafka at {self._bootstrap_servers} refuses us: {error.str()}",
                hint="check kafka.producer's security.protocol, sasl.* and ssl.*",
            )
        elif error.code() != KafkaError._ALL_BROKERS_DOWN or not self._trouble:  # noqa: SLF001 - it says less
            self._trouble = error.str()


def _closed(*_: Any) -> None:
    raise BrokenInvariant("an event for a delivery that is closed")


def _refuse_broken_promises(settings: ProducerSettings) -> None:
    """Raises ConfigurationError naming the first key that would break a promise."""
    for key in settings:
        if key in _REFUSED:
            raise ConfigurationError(f"kafka.producer.{key} cannot be set: {_REFUSED[key]}", hint="remove it")
