"""The show: a stack, a sandbox on it, an application, the relay, a consumer, a live table and a verdict.

Everything is entered on one exit stack: however the show ends, what it started is gone in the reverse order. On the way
relay and consumer are killed and started again, each once, unless a calm show is asked for.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from psycopg import conninfo
from rich.console import Console
from rich.filesize import decimal
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from cdc_outbox.demo.consumer import EFFECT_TABLE, ConsumerProcess
from cdc_outbox.demo.kafka import KAFKA_SIZE_BYTES, DownloadProgress, fetch_kafka
from cdc_outbox.demo.ledger import Ledger, Verdict
from cdc_outbox.demo.relay import RelayProcess
from cdc_outbox.demo.sandbox import Sandbox, make_sandbox, own_database, own_group, own_topics, unique_name
from cdc_outbox.demo.stack import Servers, servers
from cdc_outbox.demo.traffic import AGGREGATE_TYPE, Reader, Writer, make_account_table
from cdc_outbox.errors import CheckFailed
from cdc_outbox.inbox import schema
from cdc_outbox.postgres.connection import Connection, connect
from cdc_outbox.postgres.slots import find_slot

_WRITERS: Final = 3
_PARTITIONS: Final = 6
#: Whoever reads is given up after so long without progress: its first start on a busy machine may take a while.
_PATIENCE_SECONDS: Final = 30.0
_REFRESH_SECONDS: Final = 0.25


class Show:
    """``console`` is for people: it should be quiet when nobody watches. ``calm``: nothing is killed."""

    def __init__(self, console: Console, *, dsn: str | None, bootstrap_servers: str | None, calm: bool) -> None:
        self._console = console
        self._given_dsn = dsn
        self._given_bootstrap_servers = bootstrap_servers
        self._calm = calm
        self._ledger = Ledger()

    def run(self, seconds: float, at_end: Callable[[Verdict, Sandbox, RelayProcess], None]) -> None:
        """Run traffic for ``seconds`` and call ``at_end`` with the verdict before anything is taken down.

        Raises CheckFailed if the relay does not start, ConfigurationError if no stack is to be had.
        """
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="cdc-outbox-demo-")))
            started = self._servers(stack)
            dsn, bootstrap_servers = started.dsn, started.bootstrap_servers
            name = unique_name("cdc_outbox_demo")
            settings = {"CDC_OUTBOX_KAFKA__TOPIC": f"{name}.{{aggregate_type}}"}
            sandbox = stack.enter_context(make_sandbox(dsn, bootstrap_servers, name, settings))
            consumer_dsn = stack.enter_context(_consumers_database(dsn, f"{name}_consumer"))
            stack.enter_context(own_topics(bootstrap_servers, f"{name}."))
            stack.enter_context(own_group(bootstrap_servers, name))
            topic = _make_topic(sandbox)
            make_account_table(sandbox.dsn)
            relay = stack.enter_context(RelayProcess(sandbox.environment, folder / "relay.log"))
            relay.wait_until_ready()
            consumer = stack.enter_context(
                ConsumerProcess(
                    dsn=consumer_dsn,
                    bootstrap_servers=bootstrap_servers,
                    topic=topic,
                    group=name,
                    log=folder / "consumer.log",
                )
            )
            with (
                connect(sandbox.dsn) as source,
                connect(consumer_dsn) as effects,
                Reader(bootstrap_servers, topic, self._ledger),
                closing(_offsets_of(bootstrap_servers, name)) as offsets,
            ):
                self._run_traffic(_Running(sandbox, relay, consumer, source, effects, offsets, topic), seconds)
                rows = effects.execute("SELECT aggregate_id, event_id FROM effect ORDER BY place").fetchall()
            self._ledger.take_effects(rows)
            at_end(self._ledger.verdict(), sandbox, relay)

    def _servers(self, stack: ExitStack) -> Servers:
        """Those given, or started now."""
        if not self._given_bootstrap_servers:
            with _download_bars(self._console) as progress:
                fetch_kafka(progress)
        with self._console.status("starting the servers"):
            started = stack.enter_context(servers(self._given_dsn, self._given_bootstrap_servers))
        for name, server in (("PostgreSQL", started.postgres), ("Apache Kafka", started.kafka)):
            if server:
                self._console.print(f"[green]✓[/] {name} at 127.0.0.1:{server.port}")
        return started

    def _run_traffic(self, running: "_Running", seconds: float) -> None:
        """Writers for ``seconds``, then whoever reads until it has seen all or time is up."""
        started = time.monotonic()
        deaths = deque([("relay", running.relay, seconds / 3), ("consumer", running.consumer, seconds * 2 / 3)])
        if self._calm:
            deaths.clear()
        with Live(console=self._console, auto_refresh=False) as live:

            def watch(phase: str) -> None:
                running.check()
                elapsed_seconds = time.monotonic() - started
                live.update(_live_table(self._ledger, running, phase, elapsed_seconds), refresh=True)
                time.sleep(_REFRESH_SECONDS)

            with ExitStack() as writers:
                for number in range(_WRITERS):
                    writers.enter_context(Writer(number, running.sandbox.dsn, AGGREGATE_TYPE, self._ledger))
                while deaths or time.monotonic() < started + seconds:
                    if deaths and time.monotonic() >= started + deaths[0][2]:
                        name, process, _ = deaths.popleft()
                        process.kill()
                        process.start()
                        self._ledger.kills += 1
                        live.console.print(f"[yellow]✗[/] {name} killed with SIGKILL, and started again")
                    watch("writing")
            self._catch_up(running, watch)
            watch("done")

    def _catch_up(self, running: "_Running", watch: Callable[[str], None]) -> None:
        """Until all is delivered, acted on and read, or nothing more is for a while."""
        seen, moved_at = 0, time.monotonic()
        while time.monotonic() < moved_at + _PATIENCE_SECONDS:
            delivered, effects = self._ledger.delivered_count, running.effect_count()
            if delivered >= self._ledger.committed_count <= effects and running.records_unread() == 0:
                return  # copies come last, and must have no effect
            if delivered + effects > seen:
                seen, moved_at = delivered + effects, time.monotonic()
            watch("catching up")


@dataclass(frozen=True, slots=True)
class _Running:
    """Who plays, and a connection to either database."""

    sandbox: Sandbox
    relay: RelayProcess
    consumer: ConsumerProcess
    source: Connection
    effects: Connection
    offsets: Consumer
    """Of the consumer's group; reads nothing."""
    topic: str

    def check(self) -> None:
        """Raises CheckFailed if one of them has left."""
        for name, process in (("relay", self.relay), ("consumer", self.consumer)):
            if process.ended:
                raise CheckFailed(f"the {name} ended with {process.process.wait()}: {process.said()}")

    def effect_count(self) -> int:
        ((count,),) = self.effects.execute("SELECT count(*) FROM effect").fetchall()
        return int(count)

    def records_unread(self) -> int:
        """By what the consumer has committed."""
        partitions = [TopicPartition(self.topic, number) for number in range(_PARTITIONS)]
        unread = 0
        for committed in self.offsets.committed(partitions, timeout=5):
            first, end = self.offsets.get_watermark_offsets(committed, timeout=5)
            unread += end - max(first, committed.offset)
        return unread

    def lag_bytes(self) -> int:
        slot = find_slot(self.source, self.sandbox.name)
        return slot.lag_bytes if slot and slot.lag_bytes else 0


@contextmanager
def _consumers_database(dsn: str, name: str) -> Iterator[str]:
    """With an inbox, and a table for effects; yields its DSN."""
    own_dsn = conninfo.make_conninfo(dsn, dbname=name)
    with own_database(dsn, name):
        with connect(own_dsn) as connection:
            connection.execute(schema.sql().encode())
            connection.execute(EFFECT_TABLE)
        yield own_dsn


def _offsets_of(bootstrap_servers: str, group: str) -> Consumer:
    return Consumer({"bootstrap.servers": bootstrap_servers, "group.id": group, "log_level": 0})


def _make_topic(sandbox: Sandbox) -> str:
    """With more partitions than the broker would give it."""
    topic = f"{sandbox.name}.{AGGREGATE_TYPE}"
    admin = AdminClient({"bootstrap.servers": sandbox.bootstrap_servers, "log_level": 0})
    admin.create_topics([NewTopic(topic, _PARTITIONS, -1)])[topic].result()
    return topic


def _live_table(ledger: Ledger, running: _Running, phase: str, seconds: float) -> Table:
    percentiles = ledger.percentiles_seconds()
    p50, p99 = (f"{value * 1000:.1f} ms" for value in percentiles) if percentiles else ("-", "-")
    table = Table(title=f"cdc-outbox demo · {phase} · {seconds:.0f} s", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right", min_width=14)
    table.add_row("events committed", f"{ledger.committed_count:,}")
    table.add_row("events rolled back", f"{len(ledger.rolled_back):,}")
    table.add_row("events delivered", f"{ledger.delivered_count:,}")
    table.add_row("effects of them", f"{running.effect_count():,}")
    table.add_row("lag, events", f"{max(0, ledger.committed_count - ledger.delivered_count):,}")
    table.add_row("lag, slot", decimal(running.lag_bytes()))
    table.add_row("latency p50", p50)
    table.add_row("latency p99", p99)
    return table


@contextmanager
def _download_bars(console: Console) -> Iterator[DownloadProgress]:
    """One bar over all files that jgo fetches; none if nothing is fetched."""
    columns = (TextColumn("fetching Apache Kafka"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=0, visible=False)
        fetched_bytes = 0

        @contextmanager
        def of_file(_name: str, size_bytes: int) -> Iterator[Callable[[int], None]]:
            nonlocal fetched_bytes
            fetched_bytes += size_bytes
            bars.update(task, total=max(fetched_bytes, KAFKA_SIZE_BYTES), visible=True)
            yield lambda count: bars.update(task, advance=count)

        yield of_file
