"""The slot seen from outside: a pooled connection of its own that reads the slot's row, beside the stream."""

from types import TracebackType
from typing import Final, Self

import psycopg
from psycopg_pool import ConnectionPool, PoolTimeout

from cdc_outbox.errors import SourceUnavailable
from cdc_outbox.postgres.catalog import Slot, find_slot
from cdc_outbox.postgres.connection import Connection, connection_parameters, translated

_TIMEOUT_SECONDS: Final = 5.0


class SlotMonitor:
    """Reads one slot again and again; the pool connects anew when the connection was lost."""

    def __init__(self, dsn: str, slot: str) -> None:
        self._slot = slot
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

    def read(self) -> Slot | None:
        """Raises SourceUnavailable, OperatorNeeded."""
        try:
            with translated("reading the slot"), self._pool.connection(timeout=_TIMEOUT_SECONDS) as connection:
                return find_slot(connection, self._slot)
        except PoolTimeout as error:
            raise SourceUnavailable("the slot cannot be read: no connection") from error
