"""What a client says to PostgreSQL, read off the wire: by this a test sees what the installed command really asks.

A proxy on loopback, without TLS. Source: PostgreSQL manual, "Message Formats" (StartupMessage, Query, Parse).
"""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from psycopg import conninfo

from cdc_outbox.demo.ports import free_port

#: SSLRequest and GSSENCRequest: the server answers each by one byte, and a start-up packet follows.
_REQUESTS: Final = frozenset({80877103, 80877104})


@dataclass
class Session:
    """One connection: its start-up parameters, and every statement in the order of their sending."""

    parameters: dict[str, str]
    statements: list[str] = field(default_factory=list)

    @property
    def streams(self) -> bool:
        return self.parameters.get("replication") == "database"


@contextmanager
def listening(dsn: str) -> Iterator[tuple[str, list[Session]]]:
    """A DSN that leads to the same server by way of us, and what was said on it."""
    given = conninfo.conninfo_to_dict(dsn)
    target, port = (str(given["host"]), int(str(given["port"]))), free_port()
    sessions: list[Session] = []
    listener = socket.create_server(("127.0.0.1", port))

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(target)
                threading.Thread(target=_carry, args=[server, client], daemon=True).start()
                threading.Thread(target=_listen, args=[client, server, sessions], daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield conninfo.make_conninfo(dsn, host="127.0.0.1", port=port, gssencmode="disable"), sessions
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with source, suppress(OSError):
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)


def _listen(client: socket.socket, server: socket.socket, sessions: list[Session]) -> None:
    with client, suppress(OSError, EOFError):
        while True:
            head = _exactly(client, 8)
            length, code = struct.unpack("!II", head)
            body = _exactly(client, length - 8)
            server.sendall(head + body)
            if code not in _REQUESTS:
                break
        words = body.decode().split("\0")
        session = Session(dict(zip(words[::2], words[1::2], strict=False)))
        sessions.append(session)
        while True:
            head = _exactly(client, 5)
            body = _exactly(client, struct.unpack("!xI", head)[0] - 4)
            if head[:1] == b"Q":
                session.statements.append(body.rstrip(b"\0").decode())
            elif head[:1] == b"P":
                session.statements.append(body.split(b"\0")[1].decode())
            server.sendall(head + body)
    with suppress(OSError):
        server.shutdown(socket.SHUT_WR)


def _exactly(source: socket.socket, size: int) -> bytes:
    """Raises EOFError."""
    data = b""
    while len(data) < size:
        piece = source.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data
