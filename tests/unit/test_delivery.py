"""Settings and translations; what needs a broker is in tests/integration."""

import gc
import weakref
from typing import Any

import pytest
from confluent_kafka import KafkaError

from cdc_outbox.errors import BatchRefused, BrokerUnavailable, ConfigurationError, PoisonEvent, TopicRefused
from cdc_outbox.kafka.acknowledged import AcknowledgedDelivery
from cdc_outbox.kafka.isolation import Isolation
from cdc_outbox.kafka.refusals import _VERDICTS, denies_us, explain

PROMISES = (
    "acks",
    "enable.idempotence",
    "enable.gapless.guarantee",
    "message.timeout.ms",
    "delivery.timeout.ms",
    "partitioner",
    "request.required.acks",
    "retries",
    "message.send.max.retries",
    "delivery.report.only.error",
    "transactional.id",
    "queue.buffering.max.messages",
    "bootstrap.servers",
)


@pytest.mark.parametrize("key", PROMISES)
def test_a_key_that_would_break_a_promise_is_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"kafka\.producer\.{key} cannot be set"):
        AcknowledgedDelivery("127.0.0.1:1", {key: "1"}, max_in_flight=10)


@pytest.mark.parametrize("settings", [{"no.such.key": "1"}, {"linger.ms": "soon"}])
def test_what_librdkafka_does_not_take_is_a_configuration_error(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=r"kafka\.producer"):
        AcknowledgedDelivery("127.0.0.1:1", settings, max_in_flight=10)


def test_other_keys_are_passed_on() -> None:
    publisher = AcknowledgedDelivery("127.0.0.1:1", {"linger.ms": 1, "batch.size": 1000}, max_in_flight=10)
    assert publisher.client_settings["linger.ms"] == 1
    assert publisher.client_settings["batch.size"] == 1000
    assert publisher.client_settings["acks"] == "all"
    publisher.close()


@pytest.mark.parametrize(
    ("code", "together", "alone"),
    [
        (KafkaError.MSG_SIZE_TOO_LARGE, PoisonEvent, PoisonEvent),
        (KafkaError.INVALID_TIMESTAMP, PoisonEvent, PoisonEvent),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, TopicRefused, TopicRefused),
        (KafkaError._UNKNOWN_TOPIC, TopicRefused, TopicRefused),
        (KafkaError._TRANSPORT, BrokerUnavailable, BrokerUnavailable),
        (KafkaError._UNKNOWN_PARTITION, BatchRefused, BrokerUnavailable),
        (KafkaError._FATAL, BatchRefused, BrokerUnavailable),
        (KafkaError._GAPLESS_GUARANTEE, BatchRefused, BrokerUnavailable),
        (KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, BatchRefused, BrokerUnavailable),
        (KafkaError.UNKNOWN, BatchRefused, PoisonEvent),
        (KafkaError.INVALID_REQUEST, BatchRefused, PoisonEvent),
        (1234, BatchRefused, PoisonEvent),
    ],
)
def test_every_failure_says_what_to_do(code: int, together: type[Exception], alone: type[Exception]) -> None:
    for is_alone, kind in ((False, together), (True, alone)):
        error = explain(KafkaError(code), "outbox.a", alone=is_alone)
        assert type(error) is kind
        assert "outbox.a" in error.message


def test_every_code_that_librdkafka_knows_has_a_verdict() -> None:
    names = {name for name in dir(KafkaError) if name.strip("_").isupper() and not name.startswith("__")}
    assert names == set(_VERDICTS)


@pytest.mark.parametrize(
    ("code", "text", "denies"),
    [
        (KafkaError._AUTHENTICATION, "SASL authentication error: Authentication failed during authentication", True),
        (KafkaError._AUTHENTICATION, "Failed to acquire SASL OAUTHBEARER token: HTTP error 503", False),
        (KafkaError._AUTHENTICATION, "SaslHandshakeRequest failed: Local: Broker transport failure", False),
        (KafkaError._SSL, "SSL handshake failed: certificate verify failed", True),
        (KafkaError._SSL, "SSL handshake failed: Disconnected: connecting to a PLAINTEXT broker listener?", False),
        (KafkaError._ALL_BROKERS_DOWN, "2/2 brokers are down", False),
    ],
)
def test_only_a_refusal_of_credentials_denies_us(code: int, text: str, denies: bool) -> None:  # noqa: FBT001
    assert denies_us(KafkaError(code, text)) is denies


def test_an_isolation_is_no_cycle() -> None:
    """It holds a producer, whose threads live as long."""

    class Producer:
        def produce(self, *event: Any) -> None:
            event[4](None, None)

    producer = Producer()
    isolation = Isolation(producer.produce, lambda _topic, _reason: None)
    isolation.publish("t", b"v", b"k", -1, lambda *_: None, None, 0, [])
    assert isolation.is_settled()
    gc.disable()
    try:
        left = weakref.ref(producer)
        del producer, isolation
        assert left() is None
    finally:
        gc.enable()
