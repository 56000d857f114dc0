"""Slot, publication and server seen from outside: a pooled connection of its own, beside the stream.

It sees what the stream cannot. On PostgreSQL 18 a publication that was dropped, or lost its table, gives no error there
but silence, and the idle rule confirms what was never sent. And a server that is asked to stop fast waits for its
walsenders as long as events wait for Kafka, while it ends ordinary sessions like this one at once.
"""

import select
from types import TracebackType
from typing import Final, Self

import psycopg
from psycopg_pool import ConnectionPool, PoolTimeout

from cdc_outbox.errors import SourceUnavailable
from cdc_outbox.postgres.catalog import Slot, check_publication, find_slot, find_table
from cdc_outbox.postgres.connection import Connection, connection_parameters, translated

_TIMEOUT_SECONDS: Final = 5.0


class Monitor:
    """Looks at one slot and its publication again and again; the pool connects anew when the connection was lost."""

    def __init__(self, dsn: str, *, slot: str, publication: str, table: str) -> None:
        self._slot = slot
        self._publication = publication
        self._table = table
        self._connection: Connection | None = None
        self._pool: ConnectionPool[Connection] = ConnectionPool(
            connection_parameters(dsn, application_name="cdc-outbox monitor"),
            connection_class=psycopg.Connection,
            kwargs={"autocommit": True},
            min_size=1,
            max_size=1,
            num_workers=1,
            check=ConnectionPool.check_connection,
            open=False,
        )

    def __enter__(self) -> Self:
        self._pool.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._release()
        self._pool.close(timeout=0)

    def look(self) -> Slot | None:
        """The slot, if there is one. Raises SourceUnavailable; OperatorNeeded if the publication does not serve it."""
        connection = self._connect()
        try:
            with translated("looking at the slot"):
                check_publication(connection, self._publication, find_table(connection, self._table))
                return find_slot(connection, self._slot)
        except SourceUnavailable:
            self._release()
            raise

    def wait(self, seconds: float, *, wake_descriptor: int) -> bool:
        """Sleep until ``wake_descriptor`` is readable, at most ``seconds``. True if the server ended our session."""
        session = [] if self._connection is None else [self._connection.fileno()]
        readable, _, _ = select.select([*session, wake_descriptor], [], [], seconds)
        if not session or session[0] not in readable:
            return False
        # An idle session hears from its server only when that ends it (SQLSTATE 57P01, admin_shutdown).
        self._release()
        return True

    def _connect(self) -> Connection:
        if self._connection is None:
            try:
                self._connection = self._pool.getconn(_TIMEOUT_SECONDS)
            except PoolTimeout as error:
                raise SourceUnavailable("the slot cannot be looked at: no connection") from error
        return self._connection

    def _release(self) -> None:
        """Hand the connection back; the pool throws away one that is broken."""
        if self._connection is not None:
            self._pool.putconn(self._connection)
            self._connection = None
