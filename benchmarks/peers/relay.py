"""cdc-outbox itself: the installed command with its default configuration."""

import subprocess
import sys
from contextlib import AbstractContextManager

from benchmarks.lane import Lane
from benchmarks.peers.process import running
from cdc_outbox.demo.ports import free_port


class Relay:
    name = "cdc-outbox"
    uses_slot = True
    publishes = True

    def prepare(self, lane: Lane) -> None:
        """The lane is made for it."""

    def start(self, lane: Lane) -> AbstractContextManager[subprocess.Popen[bytes]]:
        return running([sys.executable, "-m", "cdc_outbox", "run"], self.environment(lane))

    def environment(self, lane: Lane) -> dict[str, str]:
        """Where things are; everything else is left at its default."""
        return {
            "CDC_OUTBOX_POSTGRES__DSN": lane.dsn,
            "CDC_OUTBOX_POSTGRES__SLOT": lane.slot,
            "CDC_OUTBOX_KAFKA__BOOTSTRAP_SERVERS": lane.arena.bootstrap_servers,
            "CDC_OUTBOX_HTTP__LISTEN": f"127.0.0.1:{free_port()}",
        }

    def has_finished(self, lane: Lane, process: subprocess.Popen[bytes], events: int) -> bool:
        return lane.is_confirmed()
