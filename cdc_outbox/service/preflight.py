"""Preflight: sees that server, table, columns and publication fit this configuration, and makes the router for them.

Over an ordinary connection, never over the one that streams (see `postgres.stream`).
"""

from dataclasses import dataclass, replace
from typing import Self

from cdc_outbox.config import Config
from cdc_outbox.errors import OperatorNeeded
from cdc_outbox.postgres import catalog
from cdc_outbox.postgres.catalog import Table
from cdc_outbox.postgres.connection import Connection, encoding_of
from cdc_outbox.postgres.publication import SentTable, check_publication, wasteful
from cdc_outbox.relay.router import Outbox, Router, Routing, Strays, check_payload_type, missing_field
from cdc_outbox.relay.topic_template import TopicTemplate
from cdc_outbox.service.logs import get_logger


@dataclass(frozen=True, slots=True)
class Route:
    """How rows become records, and what is sent of the outbox."""

    routing: Routing
    sent: SentTable

    def also(self, router: Router) -> Self:
        """With another outbox beside the application's."""
        return replace(self, routing=replace(self.routing, routers=[*self.routing.routers, router]))


def prepare_route(config: Config, connection: Connection, topic: TopicTemplate) -> Route:
    """Raises OperatorNeeded naming what is missing or wrong, ConfigurationError for a table name that is none."""
    catalog.check_server(connection)
    sent = check_outbox(config, connection, topic)
    table, publication = sent.table, sent.publication
    for waste in wasteful(publication):
        get_logger().warning("publication_wasteful", detail=waste)
    source = f"/postgresql/{connection.info.dbname}/{table}"
    outbox = Outbox(table.namespace, table.name, config.outbox.columns.mapping(), sent.oids)
    encoding = encoding_of(connection)
    known_topics: set[str] = set()
    router = Router(outbox, topic, config.kafka.headers, source, known_topics, encoding)
    takes_in_others = publication.of_all_tables or publication.of_schemas
    strays = Strays(publication.listed if takes_in_others else None, sent.ignored)
    return Route(Routing([router], strays, known_topics, encoding), sent)


def check_outbox(config: Config, connection: Connection, topic: TopicTemplate) -> SentTable:
    """See that the table serves, and that all of it is sent. Raises OperatorNeeded, ConfigurationError."""
    return check_sent(config, connection, find_outbox(config, connection, topic), topic)


def find_outbox(config: Config, connection: Connection, topic: TopicTemplate) -> Table:
    """The table, with columns that serve. Raises OperatorNeeded, ConfigurationError."""
    table = catalog.find_table(connection, config.outbox.table)
    outbox = Outbox(table.namespace, table.name, config.outbox.columns.mapping())
    if field := missing_field(outbox, topic, table.columns):
        is_mapped = field in outbox.columns
        raise OperatorNeeded(
            f"table {outbox} has no column {outbox.candidates(field)[-1]!r}, wanted for "
            f"{field if is_mapped else 'kafka.topic'}",
            hint=f"add it, or {f'name another with outbox.columns.{field}' if is_mapped else 'change kafka.topic'}",
        )
    payload = outbox.column("payload", table.columns)
    assert payload is not None
    check_payload_type(outbox, payload, table.columns[payload])
    return table


def check_sent(config: Config, connection: Connection, table: Table, topic: TopicTemplate) -> SentTable:
    """See that the publication sends every row of ``table``, and every column that is wanted. Raises OperatorNeeded."""
    ignored = catalog.read_names(connection, config.outbox.ignore_tables, "outbox.ignore_tables")
    sent = check_publication(connection, config.postgres.publication, table, ignored=ignored)
    outbox = Outbox(table.namespace, table.name, config.outbox.columns.mapping())
    wanted = {field: outbox.column(field, table.columns) for field in (*outbox.columns, *topic.fields, "headers")}
    for field, column in wanted.items():
        if column is not None and column not in sent.columns:
            raise _unsent(sent, field, column)
    return sent


def _unsent(sent: SentTable, field: str, column: str) -> OperatorNeeded:
    name = sent.publication.identifier
    what = f"column {column!r} of {sent.table}, wanted for {field}"
    message = f"publication {sent.publication.name!r} does not send {what}"
    if column in sent.table.generated:
        return OperatorNeeded(
            f"{message}: it is generated",
            hint="let the application or a trigger fill an ordinary column; or, on PostgreSQL 18 and if it is STORED: "
            f"ALTER PUBLICATION {name} SET (publish_generated_columns = stored)",
        )
    qualified = sent.table.identifier.as_string()
    return OperatorNeeded(
        f"{message}: its column list leaves it out",
        hint=f"in one transaction: ALTER PUBLICATION {name} DROP TABLE {qualified}; "
        f"ALTER PUBLICATION {name} ADD TABLE {qualified} (without a list, or with this column too)",
    )
