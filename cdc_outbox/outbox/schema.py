"""The SQL that makes the outbox's table, where an application's own migrations do that."""

from cdc_outbox import shipped_sql


def sql() -> str:
    """A script that may run again: sql/0002_outbox_table.sql. The relay's side of it is `cdc-outbox migrate up`."""
    return shipped_sql.read("0002_outbox_table.sql")
