"""``emit`` with any driver of Python's Database API (PEP 249): psycopg2, pg8000 and their like."""

from collections.abc import Iterable
from uuid import UUID

from cdc_outbox.outbox import Event, EventRefused, NoTransaction
from cdc_outbox.outbox.table import OutboxTable
from cdc_outbox.transactions.dbapi import Connection, run

__all__ = ["Event", "EventRefused", "NoTransaction", "Outbox"]


class Outbox(OutboxTable):
    """Writes events into the caller's transaction. Has no connection and no state: make one and keep it."""

    def emit(self, connection: Connection, event: Event) -> UUID:
        """Write one event; returns its id. Raises EventRefused, NoTransaction, and what the driver raises."""
        return self.emit_many(connection, [event])[0]

    def emit_many(self, connection: Connection, events: Iterable[Event]) -> list[UUID]:
        """Write all of them or, if one is refused, none; returns their ids. Raises as ``emit`` does."""
        rows = self.rows(events)
        for text in rows.texts:
            run(connection, self.statement, text)
        return rows.ids
