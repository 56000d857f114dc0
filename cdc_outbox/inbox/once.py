"""``once`` itself, for connections of any kind: a driver's module says of which, and how a statement is run on one."""

from collections.abc import Iterable
from datetime import timedelta
from functools import partial
from typing import Generic, TypeVar

from cdc_outbox.inbox.message import Message
from cdc_outbox.inbox.table import InboxTable
from cdc_outbox.transactions import Rows, Statement, run_each, run_each_async

C = TypeVar("C")


class InboxOf(InboxTable, Generic[C]):
    """Tells which messages are new, in the caller's transaction. Has no connection and no state: make one, keep it."""

    def once(self, connection: C, message: Message) -> bool:
        """Whether ``message`` is new to this consumer. Then act on it, in this transaction.

        If another session has it right now, this waits for that one's end (READ COMMITTED), or ends with the driver's
        serialization error (REPEATABLE READ, SERIALIZABLE): roll back and try again. If you catch an error of the
        handling and commit anyway, the message is lost. Raises NoTransaction, and what the driver raises.
        """
        return bool(self.once_many(connection, [message]))

    def once_many(self, connection: C, messages: Iterable[Message]) -> list[Message]:
        """Those of ``messages`` that are new, in their order, with one statement. Else as ``once``."""
        given = list(messages)
        return self._fresh(given, self._run(connection, self._insert, self._keys(given))) if given else []

    def prune(self, connection: C, older_than: timedelta) -> int:
        """Forget what this consumer handled longer than ``older_than`` ago; returns how many rows were deleted.

        Works in many short transactions of its own; a consumer waits for it a tenth of a second at most. A message that
        comes again afterwards is new: keep ids for longer than anybody may replay or redrive. Partitions that hold
        nothing else are dropped, and not counted; that needs their ownership. Raises OpenTransaction; NoTransaction for
        a connection of SQLAlchemy or a DB-API driver in autocommit mode; and what the driver raises.
        """
        return run_each(self._pruning(older_than), partial(self._run_alone, connection))

    def _run(self, connection: C, statement: Statement, parameter: str | None) -> Rows:
        raise NotImplementedError

    def _run_alone(self, connection: C, statement: Statement, parameter: str | None) -> Rows:
        raise NotImplementedError


class AsyncInboxOf(InboxTable, Generic[C]):
    """Tells which messages are new, in the caller's transaction. Has no connection and no state: make one, keep it."""

    async def once(self, connection: C, message: Message) -> bool:
        """Whether ``message`` is new to this consumer; see ``InboxOf.once``.

        Do not forget ``await``: a coroutine is true. mypy finds that with ``enable_error_code = ["truthy-bool"]``.
        """
        return bool(await self.once_many(connection, [message]))

    async def once_many(self, connection: C, messages: Iterable[Message]) -> list[Message]:
        """Those of ``messages`` that are new, in their order, with one statement. Else as ``once``."""
        given = list(messages)
        return self._fresh(given, await self._run(connection, self._insert, self._keys(given))) if given else []

    async def prune(self, connection: C, older_than: timedelta) -> int:
        """Forget what this consumer handled longer than ``older_than`` ago; see ``InboxOf.prune``."""
        return await run_each_async(self._pruning(older_than), partial(self._run_alone, connection))

    async def _run(self, connection: C, statement: Statement, parameter: str | None) -> Rows:
        raise NotImplementedError

    async def _run_alone(self, connection: C, statement: Statement, parameter: str | None) -> Rows:
        raise NotImplementedError
