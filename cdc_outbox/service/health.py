"""Health: what the relay is doing and, unless it streams, why not.

The relay's thread writes and others read, but for the alarm, which is the monitor's to raise.
"""

import time
from typing import Any, Final

from cdc_outbox.errors import CdcOutboxError
from cdc_outbox.service.logs import get_logger
from cdc_outbox.service.metrics import Metrics
from cdc_outbox.service.phases import HALTED, STREAMING, WAITING, Phase
from cdc_outbox.wal.lsn import LSN

_REMEMBERED_ERRORS: Final = 5
_STUCK_SECONDS: Final = 8.0


class Health:
    def __init__(self, slot: str, metrics: Metrics) -> None:
        self._slot = slot
        self.metrics = metrics
        self._log = get_logger()
        self.phase = Phase.CONNECTING
        self.reason = "not connected yet"
        self._since = time.time()
        #: what the monitor saw and the stream cannot see; the session ends with it
        self.alarm: CdcOutboxError | None = None
        #: when the session's loop last ran, monotonic seconds
        self._beat_at = time.monotonic()
        self._errors: tuple[dict[str, Any], ...] = ()
        self.confirmed_lsn = LSN(0)
        metrics.set_state(self.phase.state)

    @property
    def is_streaming(self) -> bool:
        return self.phase.state == STREAMING

    @property
    def ready(self) -> bool:
        return self.is_streaming and not self.is_stuck

    @property
    def is_stuck(self) -> bool:
        """The loop does not run: something it waits for synchronously hangs."""
        return self.is_streaming and time.monotonic() - self._beat_at > _STUCK_SECONDS

    def beat(self) -> None:
        """To be called by the session's loop, every second at least."""
        self._beat_at = time.monotonic()

    def become(self, phase: Phase, reason: str = "") -> None:
        """Enter a phase; says so in the log if the state is another one then."""
        if (phase, reason) == (self.phase, self.reason):
            return
        state, changed = phase.state, phase.state != self.phase.state
        self.phase, self.reason = phase, reason
        self.beat()
        if changed:
            self._since = time.time()
            self.metrics.set_state(state)
            if state != HALTED:  # the command says that, with its exit code
                level = self._log.warning if state == WAITING else self._log.info
                level(state, slot=self._slot, **({"reason": reason} if reason else {}))

    def remember(self, error: CdcOutboxError) -> None:
        entry = {"at": time.time(), "error": error.message, "hint": error.hint}
        self._errors = (entry, *self._errors)[:_REMEMBERED_ERRORS]

    def report(self) -> dict[str, Any]:
        """The body of /readyz. Times are Unix seconds."""
        return {
            "ready": self.ready,
            "state": self.phase.state,
            "phase": self.phase.label,
            "reason": self.reason if not self.is_stuck else "the relay waits for something that does not answer",
            "since": round(self._since, 3),
            "slot": self._slot,
            "confirmed_lsn": str(self.confirmed_lsn),
            "oldest_unconfirmed_seconds": round(self.metrics.oldest_unconfirmed_seconds(), 3),
            "last_errors": list(self._errors),
        }
