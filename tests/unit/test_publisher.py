"""Settings and translations; what needs a broker is in tests/integration."""

import pytest
from confluent_kafka import KafkaError

from cdc_outbox.errors import BatchRefused, BrokerUnavailable, ConfigurationError, OperatorNeeded, PoisonEvent
from cdc_outbox.kafka.publisher import Publisher, _explain

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
        Publisher("127.0.0.1:1", {key: "1"}, max_in_flight=10)


@pytest.mark.parametrize("settings", [{"no.such.key": "1"}, {"linger.ms": "soon"}])
def test_what_librdkafka_does_not_take_is_a_configuration_error(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=r"kafka\.producer"):
        Publisher("127.0.0.1:1", settings, max_in_flight=10)


def test_other_keys_are_passed_on() -> None:
    publisher = Publisher("127.0.0.1:1", {"linger.ms": 1, "batch.size": 1000}, max_in_flight=10)
    assert publisher.client_settings["linger.ms"] == 1
    assert publisher.client_settings["batch.size"] == 1000
    assert publisher.client_settings["acks"] == "all"
    publisher.close()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (KafkaError.MSG_SIZE_TOO_LARGE, PoisonEvent),
        (KafkaError.INVALID_RECORD, PoisonEvent),
        (KafkaError.POLICY_VIOLATION, PoisonEvent),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, OperatorNeeded),
        (KafkaError._UNKNOWN_TOPIC, OperatorNeeded),
        (KafkaError.UNKNOWN_TOPIC_OR_PART, OperatorNeeded),
        (KafkaError._MSG_TIMED_OUT, BrokerUnavailable),
        (KafkaError._PURGE_QUEUE, BrokerUnavailable),
        (KafkaError._FATAL, BatchRefused),
        (KafkaError._GAPLESS_GUARANTEE, BatchRefused),
        (KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, BrokerUnavailable),
        (KafkaError.INVALID_PRODUCER_EPOCH, BrokerUnavailable),
        (KafkaError.UNKNOWN, BrokerUnavailable),
    ],
)
def test_every_failure_says_what_to_do(code: int, kind: type[Exception]) -> None:
    error = _explain(KafkaError(code), "outbox.a")
    assert type(error) is kind
    assert "outbox.a" in error.message
