"""Topics: seen to exist before the first event goes there, or created when the configuration asks for it."""

import time
from typing import Final

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from cdc_outbox.errors import BrokerUnavailable, OperatorNeeded
from cdc_outbox.kafka.publisher import MISSING_TOPIC_HINT, Publisher

#: How long a topic that was just created may take to be known to every broker.
_PROPAGATION_SECONDS: Final = 3.0
_REQUEST_SECONDS: Final = 5.0


class Topics:
    """What is known of the cluster's topics; asks again only about topics that were not seen yet."""

    def __init__(self, publisher: Publisher, *, create: bool) -> None:
        self._publisher = publisher
        self._create = create
        self._known: set[str] = set()

    def connect(self) -> None:
        """Learn the topics that are there. Raises BrokerUnavailable, OperatorNeeded."""
        self._known = self._publisher.connect(_REQUEST_SECONDS)

    def require(self, topic: str) -> None:
        """Raises OperatorNeeded if ``topic`` is not there (after creating it, if that was asked for)."""
        if topic in self._known:
            return
        if self._create:
            self._create_topic(topic)
        deadline = time.monotonic() + _PROPAGATION_SECONDS
        while not self._exists(topic):
            if time.monotonic() > deadline:
                raise OperatorNeeded(f"topic {topic} does not exist", hint=MISSING_TOPIC_HINT)
            self._publisher.poll(0.1)
        self._known.add(topic)

    def _exists(self, topic: str) -> bool:
        try:
            metadata = self._publisher.producer.list_topics(topic, timeout=_REQUEST_SECONDS).topics[topic]
        except KafkaException as error:
            raise BrokerUnavailable(f"no broker answers about topic {topic}: {error.args[0].str()}") from error
        if metadata.error and metadata.error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
            raise OperatorNeeded(f"topic {topic} must not be described", hint="grant DESCRIBE and WRITE on the topic")
        return metadata.error is None

    def _create_topic(self, topic: str) -> None:
        """With the broker's own defaults for partitions and replication."""
        admin = AdminClient(self._publisher.client_settings)
        created = admin.create_topics([NewTopic(topic, -1, -1)], request_timeout=_REQUEST_SECONDS)[topic]
        try:
            created.result()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise OperatorNeeded(
                    f"topic {topic} cannot be created: {error.args[0].str()}", hint="create it by hand"
                ) from error
