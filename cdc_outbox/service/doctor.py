"""The doctor: looks at everything `run` needs, one thing after another, and says how to mend what is wrong.

It changes nothing but for the canary of the round trip: a row in cdc_outbox.canary, a record in canary.topic, which is
made if it is not there, and a slot for as long as it takes. PostgreSQL's and Kafka's own examinations lie with them;
here they are put together.
"""

from contextlib import closing
from functools import partial
from itertools import chain

from cdc_outbox.config import Config
from cdc_outbox.errors import CdcOutboxError
from cdc_outbox.findings import Finding, Findings
from cdc_outbox.kafka.examination import examine_broker
from cdc_outbox.kafka.publisher import Publisher
from cdc_outbox.postgres.connection import Connection, connect_bounded
from cdc_outbox.postgres.examination import (
    examine_connection,
    examine_publication,
    examine_role,
    examine_server,
    examine_slot,
)
from cdc_outbox.relay.topic_template import TopicTemplate
from cdc_outbox.service.preflight import check_sent, find_outbox
from cdc_outbox.service.round_trip import make_round_trip


def examine(config: Config) -> Findings:
    """Raises ConfigurationError for settings that cannot be tried at all."""
    topic = TopicTemplate(config.kafka.topic, config.kafka.topic_pattern)
    dsn = config.postgres.dsn.get_secret_value()
    publisher = Publisher(
        config.kafka.require_bootstrap_servers(), config.kafka.producer, max_in_flight=config.relay.max_in_flight
    )
    failed = False
    with closing(publisher):
        examinations = (
            _examine_postgres(config, dsn, topic),
            examine_broker(publisher, topic.allows, create=config.kafka.create_topics),
        )
        for finding in chain.from_iterable(examinations):
            failed |= finding.state == "failed"
            yield finding
        if failed:
            yield Finding("round trip", "warning", "not tried", "mend what failed, and run this again")
        else:
            yield make_round_trip(config, publisher)


def _examine_postgres(config: Config, dsn: str, topic: TopicTemplate) -> Findings:
    try:
        with closing(connect_bounded(dsn, application_name="cdc-outbox doctor")) as connection:
            yield from examine_connection(connection, dsn)
            yield from _examine_database(config, connection, topic)
    except CdcOutboxError as error:
        mend = error.hint or "check host and port in postgres.dsn, listen_addresses on the server, the network"
        yield Finding("connection", "failed", error.message, mend)


def _examine_database(config: Config, connection: Connection, topic: TopicTemplate) -> Findings:
    slot = config.postgres.slot
    yield from examine_server(connection, slot)
    try:
        table = find_outbox(config, connection, topic)
    except CdcOutboxError as error:
        yield Finding("outbox table", "failed", error.message, error.hint)
    else:
        yield Finding("outbox table", "ok", f"{table} has the columns that are wanted, of types that serve")
        yield from examine_publication(connection, partial(check_sent, config, connection, table, topic), slot)
        yield from examine_role(connection, table)
    yield from examine_slot(connection, slot)
