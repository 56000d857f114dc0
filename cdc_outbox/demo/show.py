"""The show: a stack, a database of its own, the relay, traffic, a live table and a verdict.

Everything is entered on one exit stack: however the show ends, what it started is gone in the reverse order.
"""

import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from psycopg import conninfo, sql
from rich.console import Console
from rich.filesize import decimal
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from cdc_outbox.demo.kafka import KAFKA_SIZE_BYTES, DownloadProgress, EmbeddedKafka, fetch_kafka
from cdc_outbox.demo.ledger import Ledger, Verdict
from cdc_outbox.demo.postgres import EmbeddedPostgres
from cdc_outbox.demo.relay import RelayProcess
from cdc_outbox.demo.stack import running, server_folder
from cdc_outbox.demo.traffic import ACCOUNT_TABLE, Reader, Writer
from cdc_outbox.errors import CheckFailed
from cdc_outbox.postgres import migrations
from cdc_outbox.postgres.connection import connect
from cdc_outbox.postgres.slots import find_slot

_WRITERS: Final = 3
_PARTITIONS: Final = 6
_AGGREGATE_TYPE: Final = "account"
_CATCH_UP_SECONDS: Final = 20.0
_REFRESH_SECONDS: Final = 0.25


@dataclass(frozen=True, slots=True)
class Scene:
    """Where the show plays. ``name`` is that of its database and slot, and the first part of its topics' names, so that
    on servers that were given it touches nothing but what is its own.
    """

    name: str
    dsn: str
    bootstrap_servers: str

    @property
    def topic(self) -> str:
        return f"{self.name}.{_AGGREGATE_TYPE}"

    @property
    def environment(self) -> dict[str, str]:
        """The relay's configuration."""
        return {
            "CDC_OUTBOX_POSTGRES__DSN": self.dsn,
            "CDC_OUTBOX_POSTGRES__SLOT": self.name,
            "CDC_OUTBOX_KAFKA__BOOTSTRAP_SERVERS": self.bootstrap_servers,
            "CDC_OUTBOX_KAFKA__TOPIC": f"{self.name}.{{aggregate_type}}",
            "CDC_OUTBOX_KAFKA__CREATE_TOPICS": "true",
        }


class Show:
    """``console`` is for people: it should be quiet when nobody watches."""

    def __init__(self, console: Console, *, dsn: str | None, bootstrap_servers: str | None) -> None:
        self._console = console
        self._given_dsn = dsn
        self._given_bootstrap_servers = bootstrap_servers
        self._ledger = Ledger()

    def run(self, seconds: float, curtain: Callable[[Verdict, Scene, RelayProcess], None]) -> None:
        """Run traffic for ``seconds`` and call ``curtain`` with the verdict before anything is taken down.

        Raises CheckFailed if the relay does not start, ConfigurationError if no stack is to be had.
        """
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="cdc-outbox-demo-")))
            dsn, bootstrap_servers = self._servers(stack)
            name = f"cdc_outbox_demo_{uuid.uuid4().hex[:8]}"
            scene = Scene(name, conninfo.make_conninfo(dsn, dbname=name), bootstrap_servers)
            stack.enter_context(_own_database(dsn, name))
            stack.enter_context(_own_topics(scene))
            _migrate(scene)
            relay = stack.enter_context(RelayProcess(scene.environment, folder / "relay.log"))
            relay.wait_until_ready()
            self._run_traffic(scene, relay, seconds)
            curtain(self._ledger.verdict(), scene, relay)

    def _servers(self, stack: ExitStack) -> tuple[str, str]:
        """DSN and bootstrap servers: those given, or of servers started now."""
        dsn, bootstrap_servers = self._given_dsn, self._given_bootstrap_servers
        folder = stack.enter_context(server_folder())
        servers: list[EmbeddedPostgres | EmbeddedKafka] = []
        if not bootstrap_servers:
            with _download_bars(self._console) as progress:
                kafka = EmbeddedKafka(folder / "kafka", fetch_kafka(progress))
            bootstrap_servers = kafka.bootstrap_servers
            servers.append(kafka)
        if not dsn:
            postgres = EmbeddedPostgres(folder / "postgres")
            dsn = postgres.dsn()
            servers.append(postgres)
        with self._console.status("starting the servers"):
            stack.enter_context(running(*servers))
        for server in servers:
            name = "PostgreSQL" if isinstance(server, EmbeddedPostgres) else "Apache Kafka"
            self._console.print(f"[green]✓[/] {name} at 127.0.0.1:{server.port}")
        return dsn, bootstrap_servers

    def _run_traffic(self, scene: Scene, relay: RelayProcess, seconds: float) -> None:
        """Writers for ``seconds``, then the reader until it has seen all or time is up."""
        started = time.monotonic()
        with (
            connect(scene.dsn) as connection,
            Reader(scene.bootstrap_servers, scene.topic, self._ledger),
            Live(console=self._console, auto_refresh=False) as live,
        ):

            def watch(phase: str) -> None:
                if relay.ended:
                    raise CheckFailed(f"the relay ended with {relay.process.wait()}: {relay.said()}")
                slot = find_slot(connection, scene.name)
                lag_bytes = slot.lag_bytes if slot and slot.lag_bytes else 0
                live.update(_live_table(self._ledger, lag_bytes, phase, time.monotonic() - started), refresh=True)
                time.sleep(_REFRESH_SECONDS)

            with ExitStack() as writers:
                for number in range(_WRITERS):
                    writers.enter_context(Writer(number, scene.dsn, _AGGREGATE_TYPE, self._ledger))
                while time.monotonic() < started + seconds:
                    watch("writing")
            deadline = time.monotonic() + _CATCH_UP_SECONDS
            while self._ledger.delivered_count < self._ledger.committed_count and time.monotonic() < deadline:
                watch("catching up")
            watch("done")


@contextmanager
def _own_database(dsn: str, name: str) -> Iterator[None]:
    """A database of the show's own, with its slots gone when it ends."""
    database = sql.Identifier(name)
    with connect(dsn) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(database))
    try:
        yield
    except BaseException as error:
        # A connection that Ctrl-C interrupted in its making is held by the traceback, and its session waits for us, a
        # minute long. DROP DATABASE waits for every session of the server.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        with connect(dsn) as connection:
            connection.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s", [name]
            )
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(database))


@contextmanager
def _own_topics(scene: Scene) -> Iterator[None]:
    """The topic of the events; in the end every topic that has the show's name in front is deleted."""
    admin = AdminClient({"bootstrap.servers": scene.bootstrap_servers, "log_level": 0})
    admin.create_topics([NewTopic(scene.topic, _PARTITIONS, -1)])[scene.topic].result()
    try:
        yield
    finally:
        topics = [topic for topic in admin.list_topics(timeout=10).topics if topic.startswith(f"{scene.name}.")]
        for deleted in admin.delete_topics(topics).values():
            deleted.result()


def _migrate(scene: Scene) -> None:
    target = migrations.Target("public.outbox", "cdc_outbox", scene.name)
    with connect(scene.dsn) as connection:
        migrations.up(connection, target, failover=False, report=lambda _: None)
        connection.execute(ACCOUNT_TABLE)


def _live_table(ledger: Ledger, lag_bytes: int, phase: str, seconds: float) -> Table:
    percentiles = ledger.percentiles_seconds()
    p50, p99 = (f"{value * 1000:.1f} ms" for value in percentiles) if percentiles else ("-", "-")
    table = Table(title=f"cdc-outbox demo · {phase} · {seconds:.0f} s", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right", min_width=14)
    table.add_row("events committed", f"{ledger.committed_count:,}")
    table.add_row("events rolled back", f"{len(ledger.rolled_back):,}")
    table.add_row("events delivered", f"{ledger.delivered_count:,}")
    table.add_row("lag, events", f"{max(0, ledger.committed_count - ledger.delivered_count):,}")
    table.add_row("lag, slot", decimal(lag_bytes))
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
