"""What is measured side by side: one file a peer, each with a class that has the shape of `Peer`."""

import subprocess
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Final, Protocol

from benchmarks.lane import Lane


class Unavailable(Exception):
    """The peer cannot run here; says why."""


class Peer(Protocol):
    name: str
    #: reads the lane's slot through a walsender, whose cost is reported too
    uses_slot: bool
    #: publishes to the lane's topic; else only its end is seen
    publishes: bool

    def prepare(self, lane: Lane) -> None:
        """Before the backlog is written."""
        ...

    def start(self, lane: Lane) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """A process that works off the backlog. Raises Unavailable."""
        ...

    def has_finished(self, lane: Lane, process: subprocess.Popen[bytes], events: int) -> bool:
        """All of the backlog is done."""
        ...


#: name -> module and class; adding a peer is a file and a line
_PEERS: Final[Mapping[str, tuple[str, str]]] = {
    "cdc-outbox": ("benchmarks.peers.relay", "Relay"),
    "cdc-outbox traced": ("benchmarks.peers.traced", "Traced"),
    "cdc-outbox traced 1 %": ("benchmarks.peers.traced", "TracedSampled"),
    "pg_recvlogical": ("benchmarks.peers.recvlogical", "RecvLogical"),
    "polling relay": ("benchmarks.peers.poller", "Poller"),
    "mq-bridge": ("benchmarks.peers.mq_bridge", "MqBridge"),
    "debezium": ("benchmarks.peers.debezium", "Debezium"),
    "debezium tuned": ("benchmarks.peers.debezium", "DebeziumTuned"),
}

NAMES: Final = tuple(_PEERS)
#: Tracing is slow enough to be measured only when it is asked for.
BY_DEFAULT: Final = tuple(name for name in NAMES if "traced" not in name)
#: Those that start at once.
WITHOUT_JAVA: Final = tuple(name for name in BY_DEFAULT if not name.startswith("debezium"))


def make_peer(name: str) -> Peer:
    module, cls = _PEERS[name]
    peer: Peer = getattr(import_module(module), cls)()
    return peer
