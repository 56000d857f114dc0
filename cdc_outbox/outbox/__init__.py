"""For those who write events: ``emit``, in the transaction that makes the change.

``event`` is what is said, ``table`` checks it and makes the statement, a module a driver runs that on the caller's own
connection: ``from cdc_outbox.outbox.psycopg import Event, Outbox``. README.md in this folder shows each.
"""

from cdc_outbox.outbox.event import Event, Json, Payload, uuid7
from cdc_outbox.outbox.table import EventRefused, to_json
from cdc_outbox.transactions import NoTransaction

__all__ = ["Event", "EventRefused", "Json", "NoTransaction", "Payload", "to_json", "uuid7"]
