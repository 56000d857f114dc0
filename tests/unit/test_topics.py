"""What is made of the broker's word about a topic that an event names."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from confluent_kafka import KafkaError, KafkaException

from cdc_outbox.errors import BrokerUnavailable, CdcOutboxError, PoisonEvent, TopicRefused
from cdc_outbox.kafka.topics import Topics

if TYPE_CHECKING:
    from cdc_outbox.kafka.acknowledged import AcknowledgedDelivery

UNKNOWN_TO_US = 999


class Broker:
    """Answers with ``codes``, the last one again and again; None: the topic is there."""

    def __init__(self, *codes: int | None) -> None:
        self.asked = 0
        self._codes = list(codes)

    def list_topics(self, topic: str, timeout: float) -> Any:  # noqa: ARG002
        code = self._codes[min(self.asked, len(self._codes) - 1)]
        self.asked += 1
        if code == KafkaError._TRANSPORT:
            raise KafkaException(KafkaError(code))
        return SimpleNamespace(topics={topic: SimpleNamespace(error=code and KafkaError(code))})


def topics(broker: Broker, *, seen: tuple[str, ...] = ("outbox.other",)) -> Topics:
    return Topics(
        cast("AcknowledgedDelivery", SimpleNamespace(producer=broker, begin_topic=lambda _: None)),
        create=False,
        ever_seen=set(seen),
    )


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (KafkaError.UNKNOWN_TOPIC_OR_PART, PoisonEvent),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, PoisonEvent),
        (KafkaError.TOPIC_EXCEPTION, PoisonEvent),
        (KafkaError.UNSUPPORTED_VERSION, TopicRefused),
        (KafkaError._TRANSPORT, BrokerUnavailable),
        (KafkaError.UNKNOWN, BrokerUnavailable),
        (UNKNOWN_TO_US, BrokerUnavailable),
    ],
)
def test_what_a_refusal_of_a_topic_means(code: int, kind: type[CdcOutboxError]) -> None:
    with pytest.raises(CdcOutboxError, match=r"outbox\.a|no broker") as caught:
        topics(Broker(code)).require_for_event("outbox.a")
    assert type(caught.value) is kind


@pytest.mark.parametrize("code", [None, KafkaError.LEADER_NOT_AVAILABLE])
def test_a_topic_is_there_although_its_leader_is_not(code: int | None) -> None:
    topics(Broker(code)).require_for_event("outbox.a")


def test_a_topic_that_has_been_there_is_missed_as_such() -> None:
    with pytest.raises(TopicRefused, match="does not exist"):
        topics(Broker(KafkaError.UNKNOWN_TOPIC_OR_PART), seen=("outbox.a",)).require_for_event("outbox.a")


def test_who_may_see_no_topic_at_all_lacks_rights() -> None:
    with pytest.raises(TopicRefused, match="cannot be described"):
        topics(Broker(KafkaError.TOPIC_AUTHORIZATION_FAILED), seen=()).require_for_event("outbox.a")


def test_a_topic_that_somebody_has_just_made_is_waited_for() -> None:
    topics(Broker(KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.UNKNOWN_TOPIC_OR_PART, None)).require_for_event(
        "outbox.a"
    )


def test_junk_by_thousands_is_neither_asked_nor_waited_for_again() -> None:
    broker = Broker(KafkaError.UNKNOWN_TOPIC_OR_PART)
    known = topics(broker)
    for _ in range(1000):
        with pytest.raises(PoisonEvent):
            known.require_for_event("outbox.junk")
    asked_first = broker.asked
    assert asked_first < 50
    for number in range(100):
        with pytest.raises(PoisonEvent):
            known.require_for_event(f"outbox.junk-{number}")
    assert broker.asked <= asked_first + 150
