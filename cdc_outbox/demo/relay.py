"""The relay as a real subprocess: the installed command, on a free port of its own."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

from cdc_outbox.demo.ports import free_port
from cdc_outbox.demo.process import ChildProcess
from cdc_outbox.errors import CheckFailed
from cdc_outbox.service.readiness import ask_readyz

_READY_SECONDS: Final = 20.0


class RelayProcess(ChildProcess):
    """`cdc-outbox run`."""

    program: Sequence[str] = (sys.executable, "-m", "cdc_outbox", "run")

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        super().__init__({"CDC_OUTBOX_HTTP__LISTEN": self.address, **environment}, log)

    def wait_until_ready(self) -> None:
        """Raises CheckFailed with what the relay printed if it ends or does not become ready."""
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline and not self.ended:
            if (self.readyz() or {}).get("ready"):
                return
            time.sleep(0.02)
        raise CheckFailed(f"the relay did not become ready; it said: {self.said()}")

    def readyz(self) -> dict[str, Any] | None:
        """What it says of itself; None if it does not answer."""
        return ask_readyz(self.address, timeout_seconds=1)

    def metric(self, sample: str) -> float | None:
        """The value of a sample, written as /metrics writes it: name and labels; None if it is not there."""
        with urlopen(f"http://{self.address}/metrics", timeout=5) as answer:
            for line in answer.read().decode().splitlines():
                name, _, value = line.rpartition(" ")
                if name == sample:
                    return float(value)
        return None
