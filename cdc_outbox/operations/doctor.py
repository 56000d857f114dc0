"""The doctor: looks at everything `run` needs, one thing after another, and says how to fix what is wrong.

It changes nothing but for the canary of the round trip: a row in cdc_outbox.canary, a record in canary.topic, which is
made if it is not there, and a slot for as long as it takes. What is checked of PostgreSQL and of Kafka
is in `postgres_checks` and `kafka_checks`.
"""

from contextlib import closing
from functools import partial
from itertools import chain

from cdc_outbox.config import Config
from cdc_outbox.errors import CdcOutboxError
from cdc_outbox.kafka.acknowledged import AcknowledgedDelivery
from cdc_outbox.operations import policy
from cdc_outbox.operations.findings import Finding, Findings
from cdc_outbox.operations.kafka_checks import broker_findings
from cdc_outbox.operations.postgres_checks import (
    connection_findings,
    publication_findings,
    role_findings,
    server_findings,
    slot_findings,
)
from cdc_outbox.operations.round_trip import make_round_trip
from cdc_outbox.postgres.connection import Connection, connect_bounded
from cdc_outbox.relay.topic_template import TopicTemplate
from cdc_outbox.service.preflight import check_sent, find_outbox


def run_checks(config: Config) -> Findings:
    """Raises ConfigurationError for settings that cannot be tried at all."""
    topic = TopicTemplate(config.kafka.topic, config.kafka.topic_pattern)
    dsn = config.postgres.dsn.get_secret_value()
    delivery = AcknowledgedDelivery(
        config.kafka.require_bootstrap_servers(), config.kafka.producer, max_in_flight=config.relay.max_in_flight
    )
    failed = False
    with closing(delivery):
        findings_of_both = (
            _postgres_findings(config, dsn, topic),
            broker_findings(delivery, topic.allows, create=config.kafka.create_topics),
        )
        for finding in chain.from_iterable(findings_of_both):
            failed |= finding.state == "failed"
            yield finding
        if failed:
            yield Finding("round trip", "warning", "not tried", "fix what failed, and run this again")
        else:
            yield make_round_trip(config, delivery)


def _postgres_findings(config: Config, dsn: str, topic: TopicTemplate) -> Findings:
    try:
        with closing(connect_bounded(dsn, application_name="cdc-outbox doctor")) as connection:
            yield from connection_findings(connection, dsn)
            yield from _database_findings(config, connection, topic)
    except CdcOutboxError as error:
        hint = error.hint or "check host and port in postgres.dsn, listen_addresses on the server, the network"
        yield Finding("connection", "failed", error.message, hint)


def _database_findings(config: Config, connection: Connection, topic: TopicTemplate) -> Findings:
    slot = config.postgres.slot
    yield from server_findings(connection, slot)
    try:
        table = find_outbox(config, connection, topic)
    except CdcOutboxError as error:
        yield Finding("outbox table", "failed", error.message, error.hint)
    else:
        yield Finding("outbox table", "ok", f"{table} has the columns that are wanted, of types that serve")
        yield from publication_findings(connection, partial(check_sent, config, connection, table, topic), slot)
        yield from role_findings(connection, table)
    yield from slot_findings(connection, slot)
    yield policy.finding(connection, slot)
