"""What a run costs: CPU and memory of processes, from the operating system's own accounting (/proc)."""

import os
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
_EVERY_SECONDS: Final = 0.02

#: Gives a process id once there is one.
FindPid = Callable[[], int | None]


def cpu_seconds(pid: int) -> float | None:
    """User and system time of the process and of its children that have ended; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return sum(map(int, fields[11:15])) / _TICKS_PER_SECOND


def peak_rss_bytes(pid: int) -> int:
    """0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


class Account:
    """CPU of some processes over the time of the ``with``, so that any stretch of it can be charged afterwards."""

    def __init__(self, **find: FindPid) -> None:
        self._find = find
        self._pids: dict[str, int] = {}
        self._times: list[float] = []
        self._cpu: dict[str, list[float]] = {name: [] for name in find}
        self.peak_rss_bytes: dict[str, int] = dict.fromkeys(find, 0)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def cpu_seconds(self, name: str, begin: float, end: float) -> float | None:
        """CPU that ``name`` took between two moments (Unix seconds); None if it was never seen."""
        samples = self._cpu[name]
        if name not in self._pids:
            return None
        last = len(self._times) - 1
        return samples[min(last, bisect_left(self._times, end))] - samples[min(last, bisect_left(self._times, begin))]

    def _watch(self) -> None:
        while not self._stopping.is_set():
            self._sample()
            self._stopping.wait(_EVERY_SECONDS)
        self._sample()

    def _sample(self) -> None:
        for name, find in self._find.items():
            if name not in self._pids and (pid := find()):
                self._pids[name] = pid
            pid = self._pids.get(name)
            spent = cpu_seconds(pid) if pid else None
            before = self._cpu[name][-1] if self._cpu[name] else 0.0
            self._cpu[name].append(before if spent is None else max(before, spent))
            if pid:
                self.peak_rss_bytes[name] = max(self.peak_rss_bytes[name], peak_rss_bytes(pid))
        self._times.append(time.time())
