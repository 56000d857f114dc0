"""Preflight: sees that server, table, columns and publication fit this configuration, and makes the router for them."""

from collections.abc import Callable

from cdc_outbox.config import Config
from cdc_outbox.postgres import catalog
from cdc_outbox.postgres.connection import Connection
from cdc_outbox.relay.router import Outbox, Router, TopicTemplate, check_columns
from cdc_outbox.service.logs import get_logger


def prepare_router(
    config: Config, connection: Connection, topic: TopicTemplate, require_topic: Callable[[str], None]
) -> Router:
    """Raises OperatorNeeded naming what is missing or wrong, ConfigurationError for a table name that is none."""
    catalog.check_server(connection)
    table = catalog.find_table(connection, config.outbox.table)
    outbox = Outbox(table.namespace, table.name, config.outbox.columns.mapping())
    check_columns(outbox, topic, table.columns)
    for waste in catalog.check_publication(connection, config.postgres.publication, table):
        get_logger().warning("publication_wasteful", detail=waste)
    source = f"/postgresql/{connection.info.dbname}/{table}"
    return Router(outbox, topic, config.kafka.headers, source, require_topic)
