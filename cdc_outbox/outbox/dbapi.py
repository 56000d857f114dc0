"""``emit`` with any driver of Python's Database API (PEP 249): psycopg2, pg8000 and their like."""

from cdc_outbox.outbox import Event, EventRefused, NoTransaction
from cdc_outbox.outbox.emit import OutboxOf
from cdc_outbox.transactions import Rows, Statement, dbapi

__all__ = ["Event", "EventRefused", "NoTransaction", "Outbox"]


class Outbox(OutboxOf[dbapi.Connection]):
    def _run(self, connection: dbapi.Connection, statement: Statement, parameter: str) -> Rows:
        return dbapi.run(connection, statement, parameter)
