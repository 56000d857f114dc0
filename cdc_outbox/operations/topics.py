"""Topics, for people: which ones kafka.topic and the rows of the outbox ask for, and which of them are there."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from cdc_outbox.config import Config
from cdc_outbox.errors import ConfigurationError, PoisonEvent
from cdc_outbox.kafka.acknowledged import AcknowledgedDelivery
from cdc_outbox.kafka.topics import REQUEST_SECONDS, create_topic
from cdc_outbox.operations import topic_values
from cdc_outbox.postgres.catalog import find_table
from cdc_outbox.postgres.connection import Connection, connect
from cdc_outbox.relay.topic_template import TopicTemplate

#: The one column that can be given by hand.
_GIVEN: Final = "aggregate_type"


@dataclass(frozen=True, slots=True)
class WantedTopic:
    name: str
    waiting: int
    """Rows, in the table or put away as dead letters, that ask for it."""
    partitions: int | None
    """None if it is not there."""
    refusal: str = ""
    """Why no event goes there: what data must not name."""


def find_topics(config: Config, aggregate_types: Sequence[str]) -> list[WantedTopic]:
    """The topics of ``aggregate_types``; without any, those that the outbox asks for.

    Raises ConfigurationError, OperatorNeeded (no right to read the outbox), UnavailableError.
    """
    template = TopicTemplate(config.kafka.topic, config.kafka.topic_pattern)
    wanted = _given(template, aggregate_types) if aggregate_types else _asked_for(config, template)
    with closing(_delivery(config)) as delivery:
        there = delivery.connect(REQUEST_SECONDS)
    return [
        WantedTopic(name, count, there.get(name), _refusal(template, name)) for name, count in sorted(wanted.items())
    ]


def create_topics(
    config: Config, topics: Sequence[WantedTopic], *, partitions: int | None, replication_factor: int | None
) -> Iterator[WantedTopic]:
    """Make those that are not there and may be; each is given when it is made. None: the broker's own default."""
    with closing(_delivery(config)) as delivery:
        for topic in topics:
            if topic.partitions is None and not topic.refusal:
                create_topic(delivery, topic.name, partitions=partitions, replication_factor=replication_factor)
                yield topic


def _delivery(config: Config) -> AcknowledgedDelivery:
    return AcknowledgedDelivery(config.kafka.require_bootstrap_servers(), config.kafka.producer, max_in_flight=1)


def _given(template: TopicTemplate, aggregate_types: Sequence[str]) -> dict[str, int]:
    if template.fields != (_GIVEN,):
        raise ConfigurationError(
            f"kafka.topic = {template.text!r} does not make a topic of an aggregate type alone",
            hint="name no types: then the rows of the outbox are asked",
        )
    return {template.fill_in((name.encode(),)) or "": 0 for name in aggregate_types}


def _asked_for(config: Config, template: TopicTemplate) -> dict[str, int]:
    if not template.fields:
        return {template.text: 0}
    with connect(config.postgres.dsn.get_secret_value()) as connection:
        return dict(_by_rows(config, template, connection))


def _by_rows(config: Config, template: TopicTemplate, connection: Connection) -> dict[str, int]:
    table = find_table(connection, config.outbox.table)
    mapped = config.outbox.columns.of(table.columns)
    columns = [mapped.get(field, field) for field in template.fields]
    counted = topic_values.of_rows(connection, table, columns)
    by_default = topic_values.of_defaults(connection, table, columns)
    topics: dict[str, int] = {}
    for values, count in [*counted, *([(by_default, 0)] if by_default else [])]:
        if topic := template.fill_in(values):
            topics[topic] = topics.get(topic, 0) + count
    for topic, count in topic_values.of_dead_letters(connection, config.postgres.slot):
        topics.setdefault(topic, count)
    return topics


def _refusal(template: TopicTemplate, topic: str) -> str:
    try:
        template.check(topic)
    except PoisonEvent as error:
        return error.message
    return ""
