"""Slot, publication and server seen from outside: a pooled connection of its own, beside the stream.

It sees what the stream cannot. On PostgreSQL 18 a publication that was dropped, or lost its table, gives no error there
but silence, and the idle rule confirms what was never sent. And a server that is asked to stop fast waits for its
walsenders as long as events wait for Kafka, while it ends ordinary sessions like this one at once.
"""

import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

from psycopg_pool import ConnectionPool, PoolTimeout

from cdc_outbox.errors import SourceUnavailable
from cdc_outbox.postgres.canary import plant
from cdc_outbox.postgres.connection import (
    BoundedConnection,
    Connection,
    connect,
    connection_parameters,
    pin_settings,
    translated,
)
from cdc_outbox.postgres.slots import Slot, find_slot

_TIMEOUT_SECONDS: Final = 1.0


class Monitor:
    """Looks at one slot and its publication again and again; the pool connects again when the connection was lost."""

    def __init__(self, dsn: str, *, slot: str, check: Callable[[Connection], object]) -> None:
        """``check`` raises OperatorNeeded if the publication does not serve the outbox (any more)."""
        self._dsn = dsn
        self._slot = slot
        self._check = check
        self._connection: BoundedConnection | None = None
        self._pool: ConnectionPool[BoundedConnection] = ConnectionPool(
            connection_parameters(dsn, application_name="cdc-outbox monitor"),
            connection_class=BoundedConnection,
            kwargs={"autocommit": True},
            min_size=1,
            max_size=1,
            num_workers=1,
            configure=pin_settings,
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
        with self._releasing_what_broke(), translated("looking at the slot"):
            self._check(connection)
            return find_slot(connection, self._slot)

    def plant_canary(self) -> None:
        """After ``look``. Raises as ``plant`` does."""
        assert self._connection is not None  # `look` has made it
        with self._releasing_what_broke():
            plant(self._connection, self._slot)

    def wait(self, seconds: float, *, wake_descriptor: int) -> None:
        """After ``look``, sleep until ``wake_descriptor`` is readable, at most ``seconds``.

        Raises SourceUnavailable if the server ended our session meanwhile: an idle one hears of nothing else.
        """
        assert self._connection is not None  # `look` has made it
        session = self._connection.fileno()
        readable, _, _ = select.select([session, wake_descriptor], [], [], seconds)
        if session in readable:
            with self._releasing_what_broke(), translated("the monitor's session"):
                self._connection.execute("SELECT")

    def _connect(self) -> BoundedConnection:
        if self._connection is None:
            try:
                self._connection = self._pool.getconn(_TIMEOUT_SECONDS)
            except PoolTimeout as error:
                connect(self._dsn).close()  # raises the reason, which the pool does not tell
                raise SourceUnavailable("no connection to look at the slot") from error
        return self._connection

    @contextmanager
    def _releasing_what_broke(self) -> Iterator[None]:
        try:
            yield
        except SourceUnavailable:
            self._release()
            raise

    def _release(self) -> None:
        """Hand the connection back; the pool throws away one that is broken."""
        if self._connection is not None:
            self._pool.putconn(self._connection)
            self._connection = None
