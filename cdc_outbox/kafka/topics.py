"""Topics: seen to exist before the first event goes there, or created when the configuration asks for it."""

import time
from typing import Final

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from cdc_outbox.errors import BrokerUnavailable, CdcOutboxError, PoisonEvent, TopicRefused
from cdc_outbox.kafka.publisher import MISSING_TOPIC_HINT, Publisher
from cdc_outbox.kafka.refusals import Verdict, verdict_on

#: How long a topic may take to be known to every broker: one that we have created, and one that somebody else has.
_CREATED_SECONDS: Final = 3.0
_PROPAGATION_SECONDS: Final = 0.2
_REQUEST_SECONDS: Final = 5.0
#: How long a topic that was missing is taken to be so without asking again: rows that name it may come by thousands.
_MISSING_SECONDS: Final = 5.0
_MOST_MISSING: Final = 10_000


class Topics:
    """What is known of the cluster's topics; asks again only about topics that were not seen yet."""

    def __init__(self, publisher: Publisher, *, create: bool, ever_seen: set[str] | None = None) -> None:
        """``ever_seen`` outlives this: topics that have been there at some time, to which this adds."""
        self._publisher = publisher
        self._create = create
        self._known: set[str] = set()
        self._ever_seen = set() if ever_seen is None else ever_seen
        #: topics that were not there: until when that is believed, monotonic seconds, and what was said
        self._missing: dict[str, tuple[float, str]] = {}

    def connect(self) -> None:
        """Learn the topics that are there. Raises BrokerUnavailable."""
        self._see(self._publisher.connect(_REQUEST_SECONDS))

    def require(self, topic: str, *, create: bool = False) -> None:
        """See that ``topic`` is there, after creating it if that is asked for, here or by the configuration.

        Raises TopicRefused if it is not, PoisonEvent if no topic can have that name, BrokerUnavailable.
        """
        if topic in self._known:
            return
        create = create or self._create
        if create:
            create_topic(self._publisher, topic)
        deadline = time.monotonic() + (_CREATED_SECONDS if create else _PROPAGATION_SECONDS)
        while not self._exists(topic):
            if time.monotonic() > deadline:
                raise TopicRefused(f"topic {topic} does not exist", topic=topic, hint=MISSING_TOPIC_HINT)
            self._publisher.poll(0.05)
        self._see({topic})

    def require_for_event(self, topic: str) -> None:
        """``require`` a topic that an event names: if it was never there, that is the event's fault.

        Raises PoisonEvent then; TopicRefused if the topic has gone, BrokerUnavailable.
        """
        until, message = self._missing.get(topic, (0.0, ""))
        if time.monotonic() < until:
            raise _missing_for_event(message)
        try:
            self.require(topic)
        except TopicRefused as error:
            if topic in self._ever_seen:
                raise
            if len(self._missing) >= _MOST_MISSING:
                self._missing.clear()
            self._missing[topic] = time.monotonic() + _MISSING_SECONDS, error.message
            raise _missing_for_event(error.message) from error

    def _see(self, topics: set[str]) -> None:
        self._known |= topics
        self._ever_seen |= topics

    def _exists(self, topic: str) -> bool:
        try:
            metadata = self._publisher.producer.list_topics(topic, timeout=_REQUEST_SECONDS).topics[topic]
        except KafkaException as error:
            raise BrokerUnavailable(f"no broker answers about topic {topic}: {error.args[0].str()}") from error
        if metadata.error and metadata.error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
            raise TopicRefused(
                f"topic {topic} must not be described, or does not exist",
                topic=topic,
                hint="grant DESCRIBE and WRITE on the topic",
            )
        return metadata.error is None


def create_topic(
    publisher: Publisher, topic: str, *, partitions: int | None = None, replication_factor: int | None = None
) -> None:
    """Unless it is there. None: the broker's own default. Raises TopicRefused, PoisonEvent, BrokerUnavailable."""
    admin = AdminClient(publisher.client_settings)
    wanted = NewTopic(topic, partitions or -1, replication_factor or -1)
    created = admin.create_topics([wanted], request_timeout=_REQUEST_SECONDS)[topic]
    try:
        created.result()
    except KafkaException as error:
        if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise _cannot_be_created(topic, error.args[0]) from error


def partitions_of_topics(publisher: Publisher) -> dict[str, int]:
    """Every topic that is there. Raises BrokerUnavailable, OperatorNeeded."""
    publisher.connect(_REQUEST_SECONDS)  # says what is wrong, if it does not answer
    topics = publisher.producer.list_topics(timeout=_REQUEST_SECONDS).topics
    return {name: len(metadata.partitions) for name, metadata in topics.items()}


def _missing_for_event(message: str) -> PoisonEvent:
    return PoisonEvent(
        message,
        reason="topic_missing",
        hint="if events belong there: cdc-outbox topics create, or kafka.create_topics = true; if not, correct what "
        "writes the row, and narrow kafka.topic_pattern to the topics there may be",
    )


def _cannot_be_created(topic: str, error: KafkaError) -> CdcOutboxError:
    what = f"topic {topic} cannot be created: {error.str()}"
    verdict = verdict_on(error)
    if verdict is Verdict.POISON:
        return PoisonEvent(what, reason=error.name(), hint="correct what writes the row, or create it by hand")
    if verdict in (Verdict.PASSING, Verdict.START_AGAIN):
        return BrokerUnavailable(what)
    return TopicRefused(what, topic=topic, hint="create it by hand")
