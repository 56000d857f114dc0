"""Slot and publication seen from outside: a pooled connection of its own that reads the catalogue, beside the stream.

It sees what the stream cannot: on PostgreSQL 18 a publication that was dropped, or lost its table, gives no error there
but silence, and the idle rule confirms what was never sent.
"""

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
        self._pool.close(timeout=0)

    def look(self) -> Slot | None:
        """The slot, if there is one. Raises SourceUnavailable; OperatorNeeded if the publication does not serve it."""
        try:
            with translated("looking at the slot"), self._pool.connection(timeout=_TIMEOUT_SECONDS) as connection:
                check_publication(connection, self._publication, find_table(connection, self._table))
                return find_slot(connection, self._slot)
        except PoolTimeout as error:
            raise SourceUnavailable("the slot cannot be looked at: no connection") from error
