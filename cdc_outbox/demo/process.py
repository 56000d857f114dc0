"""A program of ours as a real subprocess, from the ``with``'s beginning to its end; it may be killed in between."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_STOP_SECONDS: Final = 40.0


class ChildProcess:
    """Its output goes to ``log``. Of the caller's environment it has all but our own variables."""

    program: Sequence[str]

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self._environment = environment
        self._log = log

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self) -> None:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("CDC_OUTBOX_")}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self.program,
                env={**inherited, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._log.parent,  # no cdc-outbox.toml of the caller's
                start_new_session=True,  # Ctrl-C in the terminal is for us; we stop it in our order
            )

    def kill(self) -> None:
        """Without a word, as the kernel does it when memory runs out."""
        self.process.kill()
        self.process.wait()

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

    def said(self) -> str:
        """The end of its output."""
        return self._log.read_text()[-1000:].strip()
