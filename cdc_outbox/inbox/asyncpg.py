"""``once`` with asyncpg."""

from collections.abc import Iterable
from datetime import timedelta
from functools import partial

from cdc_outbox.inbox import Message, NoMessageId, NoTransaction, OpenTransaction
from cdc_outbox.inbox.table import InboxTable
from cdc_outbox.transactions import run_each_async
from cdc_outbox.transactions.asyncpg import Connection, run_alone_async, run_async

__all__ = ["AsyncInbox", "Message", "NoMessageId", "NoTransaction", "OpenTransaction"]


class AsyncInbox(InboxTable):
    """Tells which messages are new, in the caller's transaction. Has no connection and no state: make one, keep it."""

    async def once(self, connection: Connection, message: Message) -> bool:
        """Whether ``message`` is new to this consumer. Then act on it, in this transaction.

        If another session has it right now, this waits for that one's end (READ COMMITTED), or ends with the driver's
        serialization error (REPEATABLE READ, SERIALIZABLE): roll back and try again. Who swallows an error of the
        handling and commits has lost the message. Raises NoTransaction, and what the driver raises.
        """
        return bool(await self.once_many(connection, [message]))

    async def once_many(self, connection: Connection, messages: Iterable[Message]) -> list[Message]:
        """Those of ``messages`` that are new, in their order, with one statement. Else as ``once``."""
        given = list(messages)
        return self.fresh(given, await run_async(connection, self.note, self.keys(given))) if given else []

    async def prune(self, connection: Connection, older_than: timedelta) -> int:
        """Forget what this consumer handled longer than ``older_than`` ago; returns how many rows were deleted.

        Works in many short transactions of its own, and blocks no consumer. A message that comes again afterwards is
        new: keep ids for longer than anybody may replay or redrive. Partitions that hold nothing else are dropped,
        and not counted; that needs their ownership. Raises OpenTransaction, and what the driver raises.
        """
        return await run_each_async(self.pruning(older_than), partial(run_alone_async, connection))
