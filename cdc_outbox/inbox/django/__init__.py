"""``once`` with Django: the connection is named by its alias, as everywhere in Django.

As an application of Django's (``"cdc_outbox.inbox.django"`` in INSTALLED_APPS) it brings the migration of the table.
"""

from collections.abc import Iterable
from datetime import timedelta
from functools import partial

from cdc_outbox.inbox import Message, NoMessageId, NoTransaction, OpenTransaction
from cdc_outbox.inbox.table import InboxTable
from cdc_outbox.transactions import django, run_each

__all__ = ["Inbox", "Message", "NoMessageId", "NoTransaction", "OpenTransaction"]


class Inbox(InboxTable):
    """Tells which messages are new, in the caller's transaction. Has no connection and no state: make one, keep it."""

    def once(self, message: Message, *, using: str = "default") -> bool:
        """Whether ``message`` is new to this consumer. Then act on it, in this transaction.

        If another session has it right now, this waits for that one's end (READ COMMITTED), or ends with Django's
        OperationalError (REPEATABLE READ, SERIALIZABLE): roll back and try again. If you catch an error of the handling
        and commit anyway, the message is lost. Raises NoTransaction, and what Django raises.
        """
        return bool(self.once_many([message], using=using))

    def once_many(self, messages: Iterable[Message], *, using: str = "default") -> list[Message]:
        """Those of ``messages`` that are new, in their order, with one statement. Else as ``once``."""
        given = list(messages)
        return self._fresh(given, django.run(using, self._insert, self._keys(given))) if given else []

    def prune(self, older_than: timedelta, *, using: str = "default") -> int:
        """Forget what this consumer handled longer than ``older_than`` ago; returns how many rows were deleted.

        Works in many short transactions of its own; a consumer waits for it a tenth of a second at most. A message that
        comes again afterwards is new: keep ids for longer than anybody may replay or redrive. Partitions that hold
        nothing else are dropped, and not counted; that needs their ownership. Raises OpenTransaction, and what Django
        raises.
        """
        return run_each(self._pruning(older_than), partial(django.run_alone, using))
