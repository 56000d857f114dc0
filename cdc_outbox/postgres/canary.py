"""Planting a canary: a row of cdc_outbox.canary, which is in the log, and in the table no longer.

The table's own reasons are in sql/0008_canary.sql.
"""

from cdc_outbox.postgres.connection import Connection, translated


def plant(connection: Connection, slot: str) -> None:
    """Commits. Raises OperatorNeeded without the table or the right to write to it, SourceUnavailable."""
    with translated("planting a canary in cdc_outbox.canary"), connection.transaction():
        connection.execute("INSERT INTO cdc_outbox.canary (aggregate_id) VALUES (%s)", [slot])
        connection.execute("DELETE FROM cdc_outbox.canary WHERE aggregate_id = %s", [slot])
