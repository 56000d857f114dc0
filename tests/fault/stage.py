"""The stage of one scenario: database, topics, proxies, relays, writer and observer; faults are played on it.

`Stage.close` ends the load, waits until everything is confirmed, gathers the evidence and lets the checker judge it.
"""

import os
import signal
import statistics
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg import conninfo

from cdc_outbox.demo.relay import RelayProcess
from fault.checker import Evidence, Record, Verdict, duplicates_between, judge
from fault.observer import Observer
from fault.reader import read_to_the_end
from fault.servers import Servers
from fault.writer import Event, Writer
from support.relays import end_all
from support.waiting import wait_until
from support.world import World, create_topic, make_world

#: A topic's limit in bytes under which every event of the writer fits, but for its poison.
TOPIC_LIMIT: Final = 20_000
#: Retained WAL in bytes to which a caught-up slot comes down after a checkpoint.
_RETAINED_BASELINE: Final = 2_000_000


@dataclass(slots=True)
class Incident:
    began: float
    detected_seconds: float | None
    recovered_seconds: float


@dataclass(slots=True)
class Outcome:
    """A line of the table in tests/README.md."""

    fault: str
    incidents: list[Incident]
    verdict: Verdict

    def duplicates(self) -> list[int]:
        return duplicates_between(self.verdict, [incident.began for incident in self.incidents])

    def cells(self) -> list[str]:
        verdict, duplicates = self.verdict, self.duplicates() or [0]
        detected = [incident.detected_seconds for incident in self.incidents if incident.detected_seconds is not None]
        recovered = [incident.recovered_seconds for incident in self.incidents]
        return [
            self.fault,
            str(len(self.incidents)),
            f"{verdict.events:,}",
            str(len(verdict.lost)),
            str(len(verdict.reordered)),
            f"{statistics.median(duplicates):,.0f}",
            f"{max(duplicates):,}",
            f"{max(detected):.1f}" if detected else "-",
            f"{max(recovered):.1f}" if recovered else "-",
        ]


@dataclass(slots=True)
class Refusal:
    """A fault that the relay must not get over by itself: seconds until it had ended, with its reason and exit code."""

    fault: str
    seconds: float


@dataclass(slots=True)
class Stage:
    servers: Servers
    world: World
    folder: Path
    aggregate_types: list[str]
    outcomes: list[Outcome]
    refusals: list[Refusal]
    relays: list[RelayProcess] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)
    writer: Writer | None = None
    relay_class: type[RelayProcess] = RelayProcess
    #: instead of the servers' Kafka
    reads_from: str = ""
    observer: Observer = field(init=False)

    def __post_init__(self) -> None:
        self.observer = Observer(self.world.dsn, self.world.slot, self.relays)
        self.world.db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [self._oracle])
        self.observer.start()

    @property
    def _oracle(self) -> str:
        """A slot that nobody streams from: at the end it tells what was committed, in which order, up to where."""
        return f"{self.world.slot}_oracle"

    # --- relays

    def environment(self, **settings: str) -> dict[str, str]:
        environment = {
            **self.world.environment,
            "CDC_OUTBOX_POSTGRES__DSN": conninfo.make_conninfo(self.world.dsn, port=self.servers.postgres_proxy.port),
            "CDC_OUTBOX_KAFKA__BOOTSTRAP_SERVERS": f"127.0.0.1:{self.servers.kafka_proxy.port}",
            "CDC_OUTBOX_KAFKA__PRODUCER__BATCH_SIZE": str(TOPIC_LIMIT - 4000),
            "CDC_OUTBOX_RELAY__ON_POISON": "dead-letter",
            **settings,
        }
        if "CDC_OUTBOX_HTTP__LISTEN" not in settings:
            del environment["CDC_OUTBOX_HTTP__LISTEN"]
        return environment

    def start_relay(self, *, wait: bool = True, **settings: str) -> RelayProcess:
        relay = self.relay_class(self.environment(**settings), self.folder / "relay.log")
        relay.__enter__()
        self.relays.append(relay)
        if wait:
            relay.wait_until_ready()
        return relay

    def kill(self, relay: RelayProcess) -> None:
        relay.process.kill()
        relay.process.wait()
        self.relays.remove(relay)

    def stop(self, relay: RelayProcess) -> int:
        """SIGTERM, and its exit code."""
        relay.process.send_signal(signal.SIGTERM)
        code = relay.process.wait(40)
        self.relays.remove(relay)
        return code

    def ends_with(self, relay: RelayProcess, *named: str, exit_code: int = 3, within_seconds: float = 10) -> float:
        """The relay must end by itself, with a code and a reason; the seconds it took."""
        began = time.monotonic()
        code = relay.process.wait(within_seconds)
        assert code == exit_code, f"exit code {code}: {relay.said()}"
        for text in named:
            assert text in relay.said(), relay.said()
        assert "Traceback" not in relay.said()
        self.relays.remove(relay)
        return time.monotonic() - began

    # --- load

    def start_writer(self, **options: Any) -> Writer:
        self.writer = Writer(self.world.dsn, self.aggregate_types, **options)
        self.writer.start()
        return self.writer

    def wait_for_events(self, count: int, *, timeout_seconds: float = 30) -> None:
        """Until the writer has committed so many more."""
        assert self.writer
        ledger = self.writer.ledger
        enough = len(ledger.committed) + count
        wait_until(lambda: len(ledger.committed) >= enough, f"{count} events", timeout_seconds=timeout_seconds)

    # --- faults

    @contextmanager
    def incident(self) -> Iterator[None]:
        """The fault begins and ends inside; afterwards the relay must recover by itself."""
        began = time.time()
        yield
        recovered = self.wait_until_recovered()
        self.incidents.append(Incident(began, self.observer.seconds_until_not_ready(began), recovered))

    def terminate_walsender(self) -> bool:
        """False if there is none."""
        query = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s AND active"
        with psycopg.connect(self.world.dsn) as connection:
            return connection.execute(query, [self.world.slot]).rowcount > 0

    def refused(self, fault: str, seconds: float) -> None:
        """For the table: a fault that ends the relay."""
        self.refusals.append(Refusal(fault, seconds))

    def wait_until_recovered(self, *, timeout_seconds: float = 60) -> float:
        """Until some relay is ready and confirms again, or has nothing left to confirm; the seconds it took."""
        began = time.monotonic()
        self.world.db = reconnected(self.world)
        end, before = self.world.current_lsn(), self.observer.last_confirmed
        seen = len(self.observer.ready)

        def recovered() -> bool:
            confirmed = self.observer.last_confirmed
            ready = len(self.observer.ready) > seen and self.observer.is_ready
            return ready and (confirmed > before or confirmed >= end)

        try:
            wait_until(recovered, "the relay has recovered", timeout_seconds=timeout_seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; the relay said: {self._said()}") from None
        return time.monotonic() - began

    def _said(self) -> str:
        log = self.folder / "relay.log"
        return log.read_text()[-3000:] if log.exists() else "no relay"

    # --- the end

    def close(
        self,
        fault: str,
        *,
        max_duplicates: int | None = None,
        recovers_within_seconds: float = 5,
        detects_within_seconds: float | None = None,
    ) -> Verdict:
        """End the load, judge, and hold the outcome against its bounds; ``max_duplicates`` is per incident."""
        if self.writer:
            self.writer.stop()
        self.wait_until_recovered()
        self.world.wait_until_confirmed(timeout_seconds=120)
        self.check_retained_wal()
        outcome = Outcome(fault, self.incidents, self.verdict())
        self.outcomes.append(outcome)
        broken = outcome.verdict.broken_promises()
        assert not broken, f"{broken}; the relay said: {self._said()}"
        if max_duplicates is not None:
            assert max(outcome.duplicates() or [0]) <= max_duplicates, outcome.duplicates()
        for incident in self.incidents:
            assert incident.recovered_seconds <= recovers_within_seconds, (incident, self._said())
            if detects_within_seconds is not None:
                assert incident.detected_seconds is not None, "never silence"
                assert incident.detected_seconds <= detects_within_seconds
        return outcome.verdict

    def verdict(self) -> Verdict:
        """Of what Kafka and the dead letters hold now."""
        self.observer.stop()
        end_lsns, committed = self._ask_the_oracle()
        if self.writer:
            ledger = self.writer.ledger
            assert {event.id for event in ledger.committed} <= set(end_lsns), "the writer and PostgreSQL disagree"
            committed = ledger.committed
        return judge(
            Evidence(
                committed=committed,
                records=self.records(),
                dead_letters=self.dead_letters(),
                end_lsns=end_lsns,
                confirmed=self.observer.confirmed,
            )
        )

    def records(self) -> list[Record]:
        """Every topic from its beginning to its end."""
        topics = [f"outbox.{aggregate_type}" for aggregate_type in self.aggregate_types]
        return read_to_the_end(self.reads_from or self.servers.kafka.bootstrap_servers, topics)

    def dead_letters(self) -> dict[str, float]:
        rows = self.world.db.execute("SELECT event_id, extract(epoch FROM created_at) FROM cdc_outbox.parked")
        return {event_id: float(at) for event_id, at in rows}

    def check_retained_wal(self) -> None:
        """I6: the slot keeps no more WAL than before, once it has caught up and a checkpoint was made."""
        query = "SELECT pg_current_wal_lsn() - restart_lsn < %s FROM pg_replication_slots WHERE slot_name = %s"

        def came_down() -> bool:
            self.world.db.execute("CHECKPOINT")
            return self.world.db.execute(query, [_RETAINED_BASELINE, self.world.slot]).fetchone() == (True,)

        wait_until(came_down, "retained WAL is back at its baseline", timeout_seconds=20)

    def _ask_the_oracle(self) -> tuple[dict[str, int], list[Event]]:
        """End of the transaction by event id; and the events, for scenarios without a writer."""
        messages = self.world.db.execute(
            "SELECT data FROM pg_logical_slot_get_binary_changes(%s, NULL, NULL, 'proto_version', '1',"
            " 'publication_names', 'cdc_outbox')",
            [self._oracle],
        )
        end_lsns: dict[str, int] = {}
        committed: list[Event] = []
        pending: list[list[str]] = []
        for (data,) in messages:
            if data[:1] == b"I":
                pending.append(_first_texts(data, 3))
            elif data[:1] == b"C":
                (end_lsn,) = struct.unpack_from("!Q", data, 10)
                for event_id, aggregate_type, aggregate_id in pending:
                    end_lsns[event_id] = end_lsn
                    committed.append(Event(event_id, aggregate_type, aggregate_id, len(committed) + 1))
                pending.clear()
        return end_lsns, committed

    def clean_up(self) -> None:
        """Whatever happened: nothing runs on, nothing stays broken."""
        try:
            for relay in self.relays:
                if not relay.ended:
                    os.kill(relay.process.pid, signal.SIGCONT)
            end_all(self.relays, self.folder / "relay.log")
        finally:
            if self.writer:
                self.writer.stop()
            self.observer.stop()


def _first_texts(insert: bytes, count: int) -> list[str]:
    """The first columns of an Insert message: text values, none of them NULL."""
    at, texts = 8, []
    for _ in range(count):
        (length,) = struct.unpack_from("!I", insert, at + 1)
        texts.append(insert[at + 5 : at + 5 + length].decode())
        at += 5 + length
    return texts


@contextmanager
def make_stage(servers: Servers, folder: Path, outcomes: list[Outcome], refusals: list[Refusal]) -> Iterator["Stage"]:
    """A world of its own on ``servers``; ``folder`` is for the relays' log. All is well again afterwards."""
    with make_world(servers.postgres.dsn(), servers.kafka.bootstrap_servers) as world:
        world.migrate()
        types = [_create_topic(world, name) for name in ("order", "customer")]
        stage = Stage(servers, world, folder, types, outcomes, refusals)
        try:
            yield stage
        finally:
            servers.restore()
            stage.clean_up()


def _create_topic(world: World, name: str) -> str:
    """Its type. The records carry the broker's clock, so that it can be told what was there when."""
    aggregate_type = f"{world.name}_{name}"
    settings = {"message.timestamp.type": "LogAppendTime", "max.message.bytes": str(TOPIC_LIMIT)}
    create_topic(world.bootstrap_servers, f"outbox.{aggregate_type}", partitions=3, **settings)
    return aggregate_type


def peak_rss_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def reconnected(world: World) -> psycopg.Connection[Any]:
    """The world's own session, a new one if the server has ended it."""
    try:
        world.db.execute("SELECT")
    except psycopg.Error:
        world.db.close()
        connection = wait_until(lambda: _try_to_connect(world.dsn), "PostgreSQL is up", timeout_seconds=30)
        assert connection
        return connection
    return world.db


def _try_to_connect(dsn: str) -> psycopg.Connection[Any] | None:
    try:
        return psycopg.connect(dsn, autocommit=True)
    except psycopg.OperationalError:
        return None
