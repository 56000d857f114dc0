"""Topics: seen to exist before the first event goes there, or created when the configuration asks for it."""

import time
from collections.abc import Iterable
from typing import Final

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from cdc_outbox.errors import BrokerUnavailable, CdcOutboxError, PoisonEvent, TopicRefused
from cdc_outbox.kafka.acknowledged import AcknowledgedDelivery
from cdc_outbox.kafka.refusals import FORBIDDEN, MISSING, MISSING_TOPIC_HINT, Verdict, verdict_on

#: How long a topic may take to be known to every broker: one that we have created, and one that somebody else has.
_CREATED_SECONDS: Final = 3.0
_PROPAGATION_SECONDS: Final = 0.2
REQUEST_SECONDS: Final = 5.0
#: For so long after a topic was missing it is not asked about again, and others that are missing are not waited for:
#: rows that name such topics may arrive by thousands.
_MISSING_SECONDS: Final = 1.0
_MOST_MISSING: Final = 10_000


class _NotThere(TopicRefused):
    """The broker says that there is no such topic, or that we must not know."""


class _Forbidden(_NotThere):
    pass


class Topics:
    """What is known of the cluster's topics; asks again only about topics that were not seen yet.

    No delivery report is served meanwhile.
    """

    def __init__(self, delivery: AcknowledgedDelivery, *, create: bool, ever_seen: set[str] | None = None) -> None:
        """``ever_seen`` outlives this: topics that have been there at some time, to which this adds."""
        self._delivery = delivery
        self._create = create
        self._known: set[str] = set()
        self._ever_seen = set() if ever_seen is None else ever_seen
        #: topics that were missing, and when, monotonic seconds
        self._missing_at: dict[str, float] = {}
        #: when one was waited for in vain
        self._waited_at = float("-inf")

    def connect(self) -> None:
        """Learn the topics that are there. Raises BrokerUnavailable, OperatorNeeded."""
        self._see(self._delivery.connect(REQUEST_SECONDS))

    def require(self, topic: str, *, create: bool = False) -> None:
        """See that ``topic`` is there, after creating it if that is asked for, here or by the configuration.

        Raises TopicRefused if it is not, PoisonEvent if no topic can have that name, BrokerUnavailable.
        """
        if topic in self._known:
            return
        if create or self._create:
            create_topic(self._delivery, topic)
            if not self._appears(topic, _CREATED_SECONDS):
                raise BrokerUnavailable(f"topic {topic} was created, and the brokers do not know it yet")
        elif not self._appears(topic, self._patience()):
            self._waited_at = time.monotonic()
            raise _NotThere(f"topic {topic} does not exist", topic=topic, hint=MISSING_TOPIC_HINT)
        self._see({topic})

    def require_for_event(self, topic: str) -> None:
        """``require`` a topic that an event names: if it was never there, that is the event's fault.

        Nor is one that is forbidden, as long as others are not: Kafka does not tell the two apart to everybody.
        Raises PoisonEvent then; TopicRefused if it has gone, or we may see none at all; BrokerUnavailable.
        """
        if time.monotonic() - self._missing_at.get(topic, float("-inf")) < _MISSING_SECONDS:
            raise _missing_for_event(topic)
        try:
            self.require(topic)
        except _NotThere as error:
            if topic in self._ever_seen or (isinstance(error, _Forbidden) and not self._ever_seen):
                raise
            if len(self._missing_at) >= _MOST_MISSING:
                self._missing_at.clear()
            self._missing_at[topic] = time.monotonic()
            raise _missing_for_event(topic) from error
        self._delivery.begin_topic(topic)

    def _patience(self) -> float:
        """Seconds that a topic may take to appear; none right after another one has not."""
        has_just_waited = time.monotonic() - self._waited_at < _MISSING_SECONDS
        return 0.0 if has_just_waited else _PROPAGATION_SECONDS

    def _appears(self, topic: str, within_seconds: float) -> bool:
        deadline = time.monotonic() + within_seconds
        while not self._exists(topic):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _see(self, topics: Iterable[str]) -> None:
        self._known.update(topics)
        self._ever_seen.update(topics)

    def _exists(self, topic: str) -> bool:
        try:
            error = self._delivery.producer.list_topics(topic, timeout=REQUEST_SECONDS).topics[topic].error
        except KafkaException as refused:
            raise BrokerUnavailable(f"no broker answers about topic {topic}: {refused.args[0].str()}") from refused
        if error is None or verdict_on(error) is Verdict.PASSING:  # a leader is being elected
            return True
        if error.code() in MISSING:
            return False
        raise _cannot_be_described(topic, error)


def create_topic(
    delivery: AcknowledgedDelivery, topic: str, *, partitions: int | None = None, replication_factor: int | None = None
) -> None:
    """Unless it is there. None: the broker's own default. Raises TopicRefused, PoisonEvent, BrokerUnavailable."""
    admin = AdminClient(delivery.client_settings)
    wanted = NewTopic(topic, partitions or -1, replication_factor or -1)
    created = admin.create_topics([wanted], request_timeout=REQUEST_SECONDS)[topic]
    try:
        created.result()
    except KafkaException as error:
        if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise _cannot_be_created(topic, error.args[0]) from error


def _missing_for_event(topic: str) -> PoisonEvent:
    return PoisonEvent(
        f"topic {topic} does not exist",
        reason="topic_missing",
        hint="if events belong there: cdc-outbox topics create, or kafka.create_topics = true; if not, correct what "
        "writes the row, and narrow kafka.topic_pattern to the topics there may be",
    )


def _cannot_be_described(topic: str, error: KafkaError) -> CdcOutboxError:
    what = f"topic {topic} cannot be described: {error.str()}"
    if error.code() in FORBIDDEN:
        hint = "grant DESCRIBE and WRITE on the topic; or create it, if it does not exist"
        return _Forbidden(what, topic=topic, hint=hint)
    return _explain(what, topic, error, hint="check topic and broker")


def _cannot_be_created(topic: str, error: KafkaError) -> CdcOutboxError:
    what = f"topic {topic} cannot be created: {error.str()}"
    if error.code() in FORBIDDEN:
        return TopicRefused(what, topic=topic, hint="grant CREATE on the topic, or let somebody else create it")
    return _explain(what, topic, error, hint="choose other partitions and replicas, or create it by other means")


def _explain(what: str, topic: str, error: KafkaError, *, hint: str) -> CdcOutboxError:
    verdict = verdict_on(error)
    if verdict is Verdict.POISON:
        return PoisonEvent(what, reason=error.name(), hint=f"correct what writes the row; or {hint}")
    if verdict is Verdict.OPERATOR:
        return TopicRefused(what, topic=topic, hint=hint)
    return BrokerUnavailable(what)
