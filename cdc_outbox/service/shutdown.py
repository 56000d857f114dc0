"""Shutdown: SIGTERM, SIGINT or SIGHUP asks for a clean end; a second SIGTERM or SIGINT ends the process at once.

Waiting is done on a pipe that the signal handler writes to: a Python lock or event must not be touched in a handler.
"""

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class ShutdownRequested(KeyboardInterrupt):
    """A KeyboardInterrupt, because at one psycopg cancels the statement that it waits for."""


class Shutdown:
    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._deadline: float | None = None
        self._interrupts = False
        #: readable once shutdown was requested
        self.descriptor, self._wake = os.pipe()

    def install(self) -> None:
        """Take over the process's signals. Call from the main thread."""
        for number in _taken_over():
            signal.signal(number, self._on_signal)

    def request(self) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + self._timeout_seconds
            os.write(self._wake, b"!")

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, a request to stop raises ShutdownRequested, whatever is being waited for."""
        if self.requested:
            raise ShutdownRequested
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False

    @property
    def requested(self) -> bool:
        return self._deadline is not None

    @property
    def seconds_left(self) -> float:
        """Until the deadline; infinite as long as nobody asked to stop, never negative."""
        return float("inf") if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def sleep(self, seconds: float) -> None:
        """Sleep, but wake up when shutdown is requested."""
        select.select([self.descriptor], [], [], seconds)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # of a terminal that closes come several
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        self.request()
        if self._interrupts:
            self._interrupts = False
            raise ShutdownRequested


def _taken_over() -> list[signal.Signals]:
    """SIGHUP comes when a terminal is closed, and nohup has it ignored on purpose."""
    return [
        number for number in _SIGNALS if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    ]
