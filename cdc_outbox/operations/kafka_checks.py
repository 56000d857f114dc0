"""What `doctor` checks of Kafka: broker, topics, what they take and how safely, our rights."""

from collections.abc import Callable, Iterable
from typing import Any, Final

from confluent_kafka import KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._acl import AclOperation
from confluent_kafka.admin._config import ConfigResource
from confluent_kafka.admin._resource import ResourceType

from cdc_outbox.kafka.acknowledged import AcknowledgedDelivery
from cdc_outbox.kafka.refusals import MISSING_TOPIC_HINT
from cdc_outbox.operations.findings import Finding, Findings, checked

_REQUEST_SECONDS: Final = 5.0
#: librdkafka's own defaults, for keys that are not set.
_CLIENT_BYTES: Final = {"message.max.bytes": 1_000_000, "batch.size": 1_000_000}
_SAFE_REPLICAS: Final = 2
#: How many topics a line names.
_NAMED: Final = 3


def broker_findings(delivery: AcknowledgedDelivery, fits: Callable[[str], bool], *, create: bool) -> Findings:
    """``fits`` says which topics are the relay's; ``create``, whether it makes those that are missing."""
    topics: list[str] = []

    def reachable() -> str:
        names = delivery.connect(_REQUEST_SECONDS)
        topics.extend(sorted(name for name in names if not name.startswith("__") and fits(name)))
        return "answers, and takes our credentials"

    finding = checked("broker", reachable, hint="check kafka.bootstrap_servers, the broker's listeners, the network")
    yield finding
    if finding.state == "failed":
        return
    if not topics:
        found = "none there yet that fits kafka.topic"
        yield Finding("topics", "ok", found) if create else Finding("topics", "warning", found, MISSING_TOPIC_HINT)
        return
    admin = AdminClient(delivery.client_settings)
    try:
        yield from _topic_findings(admin, topics)
        yield from _setting_findings(admin, topics, delivery.client_settings)
    except KafkaException as error:
        yield Finding("topics", "warning", f"cannot be described: {error.args[0].str()}", "grant DESCRIBE on them")


def _topic_findings(admin: AdminClient, topics: list[str]) -> Findings:
    futures = admin.describe_topics(
        TopicCollection(topics), include_authorized_operations=True, request_timeout=_REQUEST_SECONDS
    )
    described = {name: future.result() for name, future in futures.items()}
    counts = {name: len(topic.partitions) for name, topic in described.items()}
    single = [name for name, count in counts.items() if count == 1]
    if single:
        yield Finding(
            "topics",
            "warning",
            f"{_named(single)}: one partition, so one consumer of a group does all the work",
            "kafka-topics.sh --alter --topic ... --partitions N, while nothing is in flight: keys move",
        )
    else:
        found = f"{_named(topics)}: {min(counts.values())} to {max(counts.values())} partitions"
        yield Finding("topics", "ok", found)
    shut = [name for name, topic in described.items() if not _may_write(topic.authorized_operations)]
    if shut:
        hint = "kafka-acls.sh --add --allow-principal User:... --operation Write --topic ..."
        yield Finding("rights to write", "failed", f"none to {_named(shut)}", hint)
    else:
        yield Finding("rights to write", "ok", "to all of them")


def _may_write(operations: Iterable[AclOperation] | None) -> bool:
    """None: the broker does not tell."""
    return operations is None or bool({AclOperation.WRITE, AclOperation.ALL} & set(operations))


def _setting_findings(admin: AdminClient, topics: list[str], client: dict[str, Any]) -> Findings:
    resources = [ConfigResource(ResourceType.TOPIC, name) for name in topics]
    futures = admin.describe_configs(resources, request_timeout=_REQUEST_SECONDS)
    settings = {
        resource.name: {key: entry.value for key, entry in future.result().items()}
        for resource, future in futures.items()
    }
    few = [name for name, of in settings.items() if int(of["min.insync.replicas"]) < _SAFE_REPLICAS]
    if few:
        yield Finding(
            "replicas",
            "warning",
            f"{_named(few)}: an acknowledged event may be on one broker only, and be lost with it",
            "three replicas, and kafka-configs.sh --alter --topic ... --add-config min.insync.replicas=2",
        )
    else:
        yield Finding("replicas", "ok", f"min.insync.replicas is {_SAFE_REPLICAS} or more")
    for key, default in _CLIENT_BYTES.items():
        sent = int(client.get(key, default))
        small = [name for name, of in settings.items() if int(of["max.message.bytes"]) < sent]
        if small:
            yield Finding(
                key,
                "failed",
                f"{_named(small)}: takes less than the {sent} bytes that kafka.producer.{key} sends",
                f"lower kafka.producer.{key}, or kafka-configs.sh --alter --topic ... --add-config "
                f"max.message.bytes={sent}",
            )
        else:
            yield Finding(key, "ok", f"{sent} bytes, which every topic takes")


def _named(topics: list[str]) -> str:
    more = len(topics) - _NAMED
    return ", ".join(topics[:_NAMED]) + (f" and {more} more" if more > 0 else "")
