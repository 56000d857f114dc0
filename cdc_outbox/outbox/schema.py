"""The SQL that makes the outbox's table, where an application's own migrations do that."""

from cdc_outbox import shipped_sql


def sql() -> str:
    """One statement that may run again: sql/0002_outbox_table.sql. `cdc-outbox migrate up` makes the relay's part."""
    return f"DO $outbox$ BEGIN\n{shipped_sql.read('0002_outbox_table.sql')}\nEND $outbox$"  # some drivers take no more
