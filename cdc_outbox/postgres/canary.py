"""Planting a canary: a row of cdc_outbox.canary (sql/0008_canary.sql), in place of the last one."""

from cdc_outbox.postgres.connection import Connection, translated


def plant(connection: Connection, slot: str) -> None:
    """Commits. Raises OperatorNeeded without the table or the right to write to it, SourceUnavailable."""
    with translated("planting a canary in cdc_outbox.canary"):
        connection.execute(
            "WITH gone AS (DELETE FROM cdc_outbox.canary WHERE aggregate_id = %(slot)s)"
            " INSERT INTO cdc_outbox.canary (aggregate_id) VALUES (%(slot)s)",
            {"slot": slot},
        )
