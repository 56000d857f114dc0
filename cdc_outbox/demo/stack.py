"""The stack: PostgreSQL and Kafka, those that are given, else in a temporary folder and gone without a trace.

The demo plays on it; tests and benchmarks run on it.
"""

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cdc_outbox.demo.kafka import EmbeddedKafka, fetch_kafka
from cdc_outbox.demo.postgres import EmbeddedPostgres


@contextmanager
def server_folder() -> Iterator[Path]:
    """A folder that other accounts may enter (PostgreSQL does not run as root), gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="cdc-outbox-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def running(*servers: EmbeddedPostgres | EmbeddedKafka) -> Iterator[None]:
    """All ``servers`` are up inside, whatever happens none is left afterwards."""
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
        with ThreadPoolExecutor() as pool:
            for started in [pool.submit(server.start) for server in servers]:
                started.result()
        yield


@dataclass(frozen=True, slots=True)
class Servers:
    dsn: str
    bootstrap_servers: str
    #: what was started here
    postgres: EmbeddedPostgres | None
    kafka: EmbeddedKafka | None


@contextmanager
def servers(dsn: str | None, bootstrap_servers: str | None) -> Iterator[Servers]:
    """What is not given is started, side by side. Raises ConfigurationError if it is not to be had."""
    with server_folder() as folder:
        postgres = None if dsn else EmbeddedPostgres(folder / "postgres")
        kafka = None if bootstrap_servers else EmbeddedKafka(folder / "kafka", fetch_kafka())
        with running(*(server for server in (postgres, kafka) if server)):
            yield Servers(
                dsn=dsn or (postgres.dsn() if postgres else ""),
                bootstrap_servers=bootstrap_servers or (kafka.bootstrap_servers if kafka else ""),
                postgres=postgres,
                kafka=kafka,
            )
