"""The observer: asks slot and relays again and again how they are, and remembers the answers with their time."""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import psycopg

from cdc_outbox.demo.relay import RelayProcess

_EVERY_SECONDS: Final = 0.025


class Observer:
    def __init__(self, dsn: str, slot: str, relays: Sequence[RelayProcess]) -> None:
        self._dsn = dsn
        self._slot = slot
        self._relays = relays
        self._stopping = threading.Event()
        #: (when the answer was there, Unix seconds; confirmed_flush_lsn)
        self.confirmed: list[tuple[float, int]] = []
        #: (when it was asked, Unix seconds; whether some relay was ready)
        self.ready: list[tuple[float, bool]] = []
        self._threads = [threading.Thread(target=self._watch_slot), threading.Thread(target=self._watch_relays)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def seconds_until_not_ready(self, since: float) -> float | None:
        """From ``since`` (Unix seconds); None if some relay has been ready all the time."""
        return next((at - since for at, ready in self.ready if at >= since and not ready), None)

    @property
    def last_confirmed(self) -> int:
        return self.confirmed[-1][1] if self.confirmed else 0

    @property
    def is_ready(self) -> bool:
        return bool(self.ready) and self.ready[-1][1]

    def _watch_slot(self) -> None:
        query = "SELECT (confirmed_flush_lsn - '0/0')::bigint FROM pg_replication_slots WHERE slot_name = %s"
        while not self._stopping.is_set():
            with suppress(psycopg.Error), psycopg.connect(self._dsn, autocommit=True, connect_timeout=2) as connection:
                while not self._stopping.wait(_EVERY_SECONDS):
                    row = connection.execute(query, [self._slot]).fetchone()
                    if row and row[0] is not None:
                        self.confirmed.append((time.time(), row[0]))
            self._stopping.wait(0.1)

    def _watch_relays(self) -> None:
        while not self._stopping.wait(2 * _EVERY_SECONDS):
            asked_at = time.time()
            self.ready.append((asked_at, any(_is_ready(relay) for relay in list(self._relays))))


def _is_ready(relay: RelayProcess) -> bool:
    return not relay.ended and bool((relay.readyz() or {}).get("ready"))
