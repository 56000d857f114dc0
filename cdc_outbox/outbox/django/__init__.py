"""``emit`` with Django: the connection is named by its alias, as everywhere in Django.

As an application of Django's (``"cdc_outbox.outbox.django"`` in INSTALLED_APPS) it brings the migration of the table.
"""

from collections.abc import Iterable
from uuid import UUID

from cdc_outbox.outbox import Event, EventRefused, NoTransaction
from cdc_outbox.outbox.table import OutboxTable
from cdc_outbox.transactions import django

__all__ = ["Event", "EventRefused", "NoTransaction", "Outbox"]


class Outbox(OutboxTable):
    """Writes events into the caller's transaction. Has no connection and no state: make one and keep it."""

    def emit(self, event: Event, *, using: str = "default") -> UUID:
        """Write one event; returns its id. Raises EventRefused, NoTransaction, and what Django raises."""
        return self.emit_many([event], using=using)[0]

    def emit_many(self, events: Iterable[Event], *, using: str = "default") -> list[UUID]:
        """Write all of them or, if one is refused, none; returns their ids. Raises as ``emit`` does."""
        checked = self._check(events)
        for rows in checked.texts:
            django.run(using, self._insert, rows)
        return checked.ids
