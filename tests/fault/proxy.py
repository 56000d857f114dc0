"""A TCP proxy that misbehaves as networks do: refuse, reset, fall silent, delay, trickle, cut, swallow, alter.

One stands between the relay and PostgreSQL, one between the relay and Kafka (which advertises the proxy's port as its
own). Connections have two threads, one a direction; what is wrong is asked before every piece that passes.
"""

import socket
import struct
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Final, Literal, Self

from cdc_outbox.demo.ports import free_port

Towards = Literal["client", "server"]

_PIECE_BYTES: Final = 65_536
_TRICKLE_BYTES: Final = 700
#: closing with this resets the connection instead of ending it
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


class Proxy:
    """Listens on ``port`` for what is meant for ``target``, from the ``with``'s beginning to its end."""

    def __init__(self, target: int, *, port: int | None = None) -> None:
        self.target = target
        self.port = port or free_port()
        self._listener: socket.socket | None = None
        self._connections: set[_Connection] = set()
        self._lock = threading.Lock()
        self._be_well()

    def _be_well(self) -> None:
        self.silent = False
        self.swallowing = False
        self.delay_seconds = 0.0
        self.trickling = False
        self.cut_bytes: int | None = None
        self.cut_towards: Towards = "client"
        self.altered: tuple[bytes, bytes] | None = None

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.refuse()

    def refuse(self) -> None:
        """Nobody listens any more, and what was connected is reset."""
        if self._listener:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
            self._listener.close()
            self._listener = None
        self.reset()

    def reset(self) -> None:
        """Reset every connection, in the middle of whatever it carries."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.reset()

    def fall_silent(self) -> None:
        """Half-open: nothing passes any more, nobody is told, new connections are taken and lead nowhere."""
        self.silent = True

    def forget_connections(self) -> None:
        """Those that exist fall silent for good, as if a firewall had dropped them; new ones are carried."""
        with self._lock:
            for connection in self._connections:
                connection.forgotten = True

    def swallow_answers(self) -> None:
        """What the server says is lost; what the client says arrives. An acknowledgement that never comes."""
        self.swallowing = True

    def delay(self, seconds: float) -> None:
        self.delay_seconds = seconds

    def trickle(self) -> None:
        """A few hundred bytes at a time, a few hundred times a second."""
        self.trickling = True

    def cut_after(self, size: int, *, towards: Towards) -> None:
        """Pass ``size`` bytes more in that direction, wherever in a message that is, then reset; again and again."""
        self.cut_bytes, self.cut_towards = size, towards

    def alter(self, what: bytes, by: bytes) -> None:
        """Replace bytes on their way to the client, as a faulty peer would."""
        self.altered = (what, by)

    def restore(self) -> None:
        """All is well again. What had been silenced or robbed is reset, as a firewall does that has forgotten it."""
        harmed = self.silent or self.swallowing
        self._be_well()
        if harmed:
            self.reset()
        if self._listener is None:
            self._listen()

    def _listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target), timeout=5)
            except OSError:  # as if it had been refused
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                client.close()
                continue
            server.settimeout(None)
            connection = _Connection(self, client, server)
            with self._lock:
                self._connections.add(connection)
            connection.start()

    def discard(self, connection: "_Connection") -> None:
        with self._lock:
            self._connections.discard(connection)


class _Connection:
    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._passed = {"client": 0, "server": 0}
        self.forgotten = False
        for side in (client, server):
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start(self) -> None:
        for source, sink, towards in (
            (self._client, self._server, "server"),
            (self._server, self._client, "client"),
        ):
            threading.Thread(target=self._carry, args=[source, sink, towards], daemon=True).start()

    def reset(self) -> None:
        for side in (self._client, self._server):
            with suppress(OSError):
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                side.shutdown(socket.SHUT_RDWR)
            side.close()
        self._proxy.discard(self)

    def _carry(self, source: socket.socket, sink: socket.socket, towards: Towards) -> None:
        try:
            while piece := source.recv(_TRICKLE_BYTES if self._proxy.trickling else _PIECE_BYTES):
                self._hold_up(source)
                self._pass_on(piece, sink, towards)
            sink.shutdown(socket.SHUT_WR)  # an end, decently passed on
        except OSError:
            self.reset()

    def _hold_up(self, source: socket.socket) -> None:
        proxy = self._proxy
        while proxy.silent or self.forgotten:
            time.sleep(0.02)
            source.getpeername()  # raises OSError once the connection was reset
        if seconds := proxy.delay_seconds + 0.002 * proxy.trickling:
            time.sleep(seconds)

    def _pass_on(self, piece: bytes, sink: socket.socket, towards: Towards) -> None:
        """Raises OSError where the connection is to be cut."""
        proxy = self._proxy
        if towards == "client" and proxy.swallowing:
            return
        if towards == "client" and proxy.altered:
            piece = piece.replace(*proxy.altered)
        if proxy.cut_bytes is None or proxy.cut_towards != towards:
            sink.sendall(piece)
            return
        left = max(0, proxy.cut_bytes - self._passed[towards])
        sink.sendall(piece[:left])
        self._passed[towards] += len(piece)
        if len(piece) >= left:
            raise ConnectionResetError
