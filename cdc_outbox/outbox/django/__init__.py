"""``emit`` with Django: the connection is named by its alias, as everywhere in Django."""

from collections.abc import Iterable
from uuid import UUID

from cdc_outbox.outbox import Event, EventRefused, NoTransaction
from cdc_outbox.outbox.table import OutboxTable
from cdc_outbox.transactions.django import run

__all__ = ["Event", "EventRefused", "NoTransaction", "Outbox"]


class Outbox(OutboxTable):
    """Writes events into the caller's transaction. Has no connection and no state: make one and keep it."""

    def emit(self, event: Event, *, using: str = "default") -> UUID:
        """Write one event; returns its id. Raises EventRefused, NoTransaction, and what Django raises."""
        return self.emit_many([event], using=using)[0]

    def emit_many(self, events: Iterable[Event], *, using: str = "default") -> list[UUID]:
        """Write all of them or, if one is refused, none; returns their ids. Raises as ``emit`` does."""
        rows = self.rows(events)
        for text in rows.texts:
            run(using, self.statement, text)
        return rows.ids
