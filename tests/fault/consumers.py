"""Consumers of one topic, processes with the loop in them; and what they have done, judged by the demo's ledger."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psycopg
from confluent_kafka import Producer

from cdc_outbox.demo.ledger import Ledger, Verdict
from cdc_outbox.inbox import schema as inbox_sql
from fault.loop_consumer import Settings
from support.waiting import wait_until

_TABLES = """
    CREATE TABLE effect (place bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, aggregate_id text NOT NULL,
                         event_id text NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp());
    CREATE TABLE poison (key text PRIMARY KEY, failure text NOT NULL)"""


@dataclass
class Consumers:
    settings: Settings
    db: psycopg.Connection[Any]
    folder: Path
    ledger: Ledger = field(default_factory=Ledger)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    kills: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    #: Of the first event; of all copies alike, and not so long ago that the broker would forget them.
    committed_at_ms: int = field(default_factory=lambda: int(time.time() * 1000))

    def produce(self, events: int, *, keys: int, times: int = 1, begin: int = 0) -> None:
        """Events as a relay would have published them, each ``times`` times, copies up to 50 records apart."""
        producer = Producer({"bootstrap.servers": self.settings.bootstrap_servers, "enable.idempotence": True})
        numbers = list(range(begin, begin + events))
        for repeat in range(times):
            for number in numbers:
                producer.produce(
                    self.settings.topic,
                    key=f"a-{number % keys}",
                    value=b"{}",
                    headers={"id": f"e-{number}"},
                    timestamp=self.committed_at_ms + number,
                )
                producer.poll(0)
                if repeat == 0:
                    self.ledger.commit([(f"a-{number % keys}", f"e-{number}")])
        assert producer.flush(30) == 0

    def poison(self, key: str, failure: str) -> None:
        self.db.execute("INSERT INTO poison VALUES (%s, %s)", [key, failure])

    def start(self, **changes: Any) -> subprocess.Popen[bytes]:
        with (self.folder / "consumers.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "fault.loop_consumer", replace(self.settings, **changes).as_argument()],
                cwd=Path(__file__).parents[1],
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGTERM)
        try:
            ended_with = process.wait(20)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # it writes where it stands into its log
            ended_with = process.wait(20)
        assert ended_with == 0, self.log()

    def end_loop(self, process: subprocess.Popen[bytes]) -> None:
        """Without a broker: `consume` ends by itself, and librdkafka's ``close`` after it may not (its issue 4519)."""
        process.send_signal(signal.SIGTERM)
        wait_until(
            lambda: f"the loop of process {process.pid} has ended" in self.log(), "the loop ends", timeout_seconds=20
        )
        process.send_signal(signal.SIGTERM)  # the second one ends it, wherever it is
        assert process.wait(20) in (0, -signal.SIGTERM), self.log()

    def log(self) -> str:
        """The end of it, without librdkafka's own complaints."""
        lines = (self.folder / "consumers.log").read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if not line.startswith("%"))[-4000:]

    def keep_alive(
        self, member: str, ending: threading.Event, *, kills: int = 0, seed: int = 0, **changes: Any
    ) -> None:
        """A consumer that is started again whenever it dies; ``kills`` times it is made to, at points of ``seed``."""
        dice = random.Random(seed)
        while not ending.is_set():
            process = self.start(member=member, dies_at=dice.randint(1, 120) if kills > 0 else 0, **changes)
            while process.poll() is None and not ending.is_set():
                time.sleep(0.05)
            if process.poll() is None:
                self.stop(process)
            elif process.returncode == -signal.SIGKILL:
                kills -= 1
                with self._lock:
                    self.kills += 1
            else:
                raise AssertionError(self.log())

    def reconnect(self) -> None:
        self.db.close()
        self.db = psycopg.connect(self.settings.dsn, autocommit=True)

    def effects(self) -> int:
        row = self.db.execute("SELECT count(*) FROM effect").fetchone()
        return int(row[0]) if row else 0

    def wait_for_effects(self, count: int, *, timeout_seconds: float = 60) -> None:
        wait_until(lambda: self.effects() >= count, f"{count} effects", timeout_seconds=timeout_seconds)

    def parked(self) -> dict[str, int]:
        """How many there are, by state."""
        return dict(self.db.execute("SELECT state, count(*) FROM inbox_parked GROUP BY 1").fetchall())

    def verdict(self) -> Verdict:
        self.ledger.effects.clear()
        self.ledger.take_effects(self.db.execute("SELECT aggregate_id, event_id FROM effect ORDER BY place").fetchall())
        return self.ledger.verdict()


@contextmanager
def consumers_of(settings: Settings, folder: Path) -> Iterator[Consumers]:
    """Makes their tables; ends the processes that are left."""
    made = Consumers(settings, psycopg.connect(settings.dsn, autocommit=True), folder)
    made.db.execute(inbox_sql.sql().encode())
    made.db.execute(_TABLES)
    try:
        yield made
    finally:
        made.db.close()
        for process in made.processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
            process.kill()
            process.wait()
