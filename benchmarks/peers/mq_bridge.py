"""mq-bridge: a Rust core with a Python face, the fastest peer that a registry has. It keys by the row's primary key.

`python -m benchmarks.peers.mq_bridge` is its process; what it is told is in the environment.
"""

import os
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from importlib.util import find_spec

from psycopg import conninfo

from benchmarks.lane import Lane
from benchmarks.peers import Unavailable
from benchmarks.peers.process import running


class MqBridge:
    name = "mq-bridge"
    uses_slot = True
    publishes = True

    def prepare(self, lane: Lane) -> None:
        """Nothing."""

    def start(self, lane: Lane) -> AbstractContextManager[subprocess.Popen[bytes]]:
        if find_spec("mq_bridge") is None:
            raise Unavailable("mq-bridge is not installed: pip install 'cdc-outbox[benchmarks]'")
        dsn = conninfo.conninfo_to_dict(lane.dsn)
        url = f"postgresql://{dsn['user']}:{dsn['password']}@{dsn['host']}:{dsn['port']}/{dsn['dbname']}"
        settings = {
            "BRIDGE_POSTGRES": url,
            "BRIDGE_SLOT": lane.slot,
            "BRIDGE_KAFKA": lane.arena.bootstrap_servers,
            "BRIDGE_TOPIC": lane.topic,
        }
        return running([sys.executable, "-m", "benchmarks.peers.mq_bridge"], settings)

    def has_finished(self, lane: Lane, process: subprocess.Popen[bytes], events: int) -> bool:
        return lane.is_confirmed() or lane.arrived() >= events


def main() -> None:
    import mq_bridge

    source = {
        "url": os.environ["BRIDGE_POSTGRES"],
        "publication": "cdc_outbox",
        "slot_name": os.environ["BRIDGE_SLOT"],
        "create_slot": False,
        "status_interval_ms": 1000,
    }
    target = {
        "url": os.environ["BRIDGE_KAFKA"],
        "topic": os.environ["BRIDGE_TOPIC"],
        "partition_key": "postgres.key",
        "create_topic": False,
        "producer_options": [["acks", "all"], ["compression.type", "lz4"]],
    }
    route = {"input": {"postgres_cdc": source}, "output": {"kafka": target}, "batch_size": 1024}
    mq_bridge.Route.from_config(route, "benchmark").start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
