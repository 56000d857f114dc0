"""For those who write events: ``emit``, in the transaction that makes the change.

``event`` is what is said, ``payload`` and ``table`` check it and make the statement, ``emit`` hands that over, and a
module a driver runs it on the caller's own connection: ``from cdc_outbox.outbox.psycopg import Event, Outbox``.
README.md in this folder shows each.
"""

from cdc_outbox.outbox.event import Event, Json, Payload, uuid7
from cdc_outbox.outbox.payload import to_json
from cdc_outbox.outbox.table import EventRefused
from cdc_outbox.transactions import NoTransaction

__all__ = ["Event", "EventRefused", "Json", "NoTransaction", "Payload", "to_json", "uuid7"]
