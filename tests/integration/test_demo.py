"""The show, taken down whatever it was doing."""

import select
import time
import uuid

import psycopg
import pytest
from psycopg import conninfo, pq

from cdc_outbox.demo.sandbox import own_database


def interrupted_while_connecting(dsn: str) -> None:
    """As Ctrl-C inside psycopg.connect: the server waits for the password, and the traceback holds the connection."""
    without_detours = conninfo.make_conninfo(dsn, sslmode="disable", gssencmode="disable")
    pgconn = pq.PGconn.connect_start(without_detours.encode())
    while pgconn.connect_poll() != pq.PollingStatus.READING:
        select.select([], [pgconn.socket], [], 5)
    select.select([pgconn.socket], [], [], 5)  # the server has asked
    raise KeyboardInterrupt


def test_what_was_connecting_when_it_was_interrupted_does_not_hold_up_its_end(postgres: str) -> None:
    """DROP DATABASE waits for every session of the server, and one that is half connected answers after a minute."""
    name = f"show_{uuid.uuid4().hex[:8]}"

    def show() -> None:
        with own_database(postgres, name):
            interrupted_while_connecting(postgres)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        show()
    assert time.monotonic() - began < 10
    with psycopg.connect(postgres) as connection:
        assert not connection.execute("SELECT FROM pg_database WHERE datname = %s", [name]).rowcount
