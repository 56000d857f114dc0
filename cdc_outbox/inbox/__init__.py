"""For those who read events: act once on each, or only on what is newer; park what cannot be handled.

``message`` is what came. ``table``, ``parking``, ``versions``, ``requests`` and ``attempts`` make the statements, a
file a table, and read their answers. ``any_driver`` has the methods, and a module a driver runs them on the caller's
own connection: ``from cdc_outbox.inbox.psycopg import Inbox, Message``. ``confluent`` is a loop around it. README.md
in this folder shows each.
"""

from cdc_outbox.inbox.message import Message, NoMessageId
from cdc_outbox.inbox.parking import NotParked
from cdc_outbox.inbox.requests import IdempotencyKeyReused, InProgress
from cdc_outbox.transactions import NoTransaction, OpenTransaction

__all__ = [
    "IdempotencyKeyReused",
    "InProgress",
    "Message",
    "NoMessageId",
    "NoTransaction",
    "NotParked",
    "OpenTransaction",
]
