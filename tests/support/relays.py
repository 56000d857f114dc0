"""How the relays of a test must have ended, whatever else it looked at."""

import signal
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Final

from cdc_outbox.demo.relay import RelayProcess

#: A clean end, a configuration that is none, an operator needed; or what the test did to it.
_EXPECTED: Final = (0, 2, 3, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)


def end_all(relays: Iterable[RelayProcess], log: Path) -> None:
    """End those that still run, and look at how each has ended."""
    were_running = [(relay, not relay.ended) for relay in relays]
    for relay, _ in were_running:
        relay.__exit__(None, None, None)
    for relay, was_running in were_running:
        check_end(relay, log, was_running=was_running)


def check_end(relay: RelayProcess, log: Path, *, was_running: bool) -> None:
    """A relay that the test has left running ends cleanly; no other has ended as only a bug of ours would end it."""
    code, said = relay.process.returncode, log.read_text(errors="replace")
    assert code == 0 if was_running else code in _EXPECTED, f"exit code {code}: {said[-3000:]}"
    assert "Traceback" not in said, said[-3000:]


class CheckedRelay(RelayProcess):
    """As the fixtures' relays: at the end of the ``with`` it is looked at."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        was_running = not self.ended
        super().__exit__(kind, error, tb)
        if kind is None:
            check_end(self, self._log, was_running=was_running)
