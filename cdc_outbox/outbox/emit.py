"""``emit`` itself, for connections of any kind: a driver's module says of which, and how a statement is run on one."""

from collections.abc import Iterable
from typing import Generic, TypeVar
from uuid import UUID

from cdc_outbox.outbox.event import Event
from cdc_outbox.outbox.table import OutboxTable
from cdc_outbox.transactions import Rows, Statement

C = TypeVar("C")


class OutboxOf(OutboxTable, Generic[C]):
    """Writes events into the caller's transaction. Has no connection and no state: make one and keep it."""

    def emit(self, connection: C, event: Event) -> UUID:
        """Write one event; returns its id. Raises EventRefused, NoTransaction, and what the driver raises."""
        return self.emit_many(connection, [event])[0]

    def emit_many(self, connection: C, events: Iterable[Event]) -> list[UUID]:
        """Write all of them or, if one is refused, none; returns their ids. Raises as ``emit`` does."""
        checked = self._check(events)
        for rows in checked.texts:
            self._run(connection, self._insert, rows)
        return checked.ids

    def _run(self, connection: C, statement: Statement, parameter: str) -> Rows:
        raise NotImplementedError


class AsyncOutboxOf(OutboxTable, Generic[C]):
    """Writes events into the caller's transaction. Has no connection and no state: make one and keep it."""

    async def emit(self, connection: C, event: Event) -> UUID:
        """Write one event; returns its id. Raises EventRefused, NoTransaction, and what the driver raises."""
        return (await self.emit_many(connection, [event]))[0]

    async def emit_many(self, connection: C, events: Iterable[Event]) -> list[UUID]:
        """Write all of them or, if one is refused, none; returns their ids. Raises as ``emit`` does."""
        checked = self._check(events)
        for rows in checked.texts:
            await self._run(connection, self._insert, rows)
        return checked.ids

    async def _run(self, connection: C, statement: Statement, parameter: str) -> Rows:
        raise NotImplementedError
