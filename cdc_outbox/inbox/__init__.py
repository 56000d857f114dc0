"""For those who read events: ``once``, in the transaction that makes the effect.

``message`` is what came, ``table`` makes the statements and reads their answers, a module a driver runs them on the
caller's own connection: ``from cdc_outbox.inbox.psycopg import Inbox, Message``. README.md in this folder shows each.
"""

from cdc_outbox.inbox.message import Message, NoMessageId
from cdc_outbox.transactions import NoTransaction, OpenTransaction

__all__ = ["Message", "NoMessageId", "NoTransaction", "OpenTransaction"]
