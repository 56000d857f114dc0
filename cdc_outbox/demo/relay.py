"""The relay as a real subprocess: the installed command, on free ports of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.request import urlopen

from cdc_outbox.demo.ports import free_port
from cdc_outbox.errors import CheckFailed
from cdc_outbox.service.http import ask_readyz

_READY_SECONDS: Final = 20.0
_STOP_SECONDS: Final = 40.0


class RelayProcess:
    """`cdc-outbox run`, from the ``with``'s beginning to its end; its output goes to ``log``."""

    program: Sequence[str] = (sys.executable, "-m", "cdc_outbox", "run")

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._environment = {"CDC_OUTBOX_HTTP__LISTEN": self.address, **environment}
        self._log = log

    def __enter__(self) -> Self:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("CDC_OUTBOX_")}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self.program,
                env={**inherited, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._log.parent,  # no cdc-outbox.toml of the caller's
                start_new_session=True,  # Ctrl-C in the terminal is for us; we stop the relay in our order
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self.ended:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    @property
    def ended(self) -> bool:
        """Asked of the kernel: Ctrl-C inside Popen.poll leaves its lock taken, and then nobody can wait any more."""
        if self.process.returncode is not None:
            return True
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # another thread has waited for it at this very moment
            return True

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

    def said(self) -> str:
        """The end of its output."""
        return self._log.read_text()[-1000:].strip()
