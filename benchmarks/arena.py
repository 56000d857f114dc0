"""The arena: PostgreSQL and Kafka for all runs, given or the embedded stack, and what they are."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
from confluent_kafka import libversion

from cdc_outbox.demo.kafka import KAFKA
from cdc_outbox.demo.stack import servers


@dataclass(frozen=True, slots=True)
class Arena:
    admin_dsn: str
    bootstrap_servers: str
    #: of the embedded broker; None if Kafka was given
    broker_pid: int | None
    #: PostgreSQL's programs, if they are known
    programs: Path | None
    #: how long a peer may take over a backlog
    patience_seconds: float

    def conditions(self) -> dict[str, Any]:
        """What a result cannot be read without."""
        with psycopg.connect(self.admin_dsn) as connection:
            names = ("server_version", "fsync", "synchronous_commit", "shared_buffers", "wal_level")
            server = {name: connection.execute(f"SHOW {name}".encode()).fetchone() for name in names}
        return {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "shared": "PostgreSQL, broker, relay and benchmark share these cores; connections are TCP on loopback",
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "postgresql": {name: row[0] for name, row in server.items() if row},
            "kafka": KAFKA.rpartition(":")[2] if self.broker_pid else f"given: {self.bootstrap_servers}",
            "topic": "6 partitions, acks=all, one broker",
            "librdkafka": libversion()[0],
            "psycopg": version("psycopg"),
            "confluent-kafka": version("confluent-kafka"),
            "cdc-outbox": version("cdc-outbox"),
        }


@contextmanager
def open_arena(postgres: str | None, kafka: str | None, *, patience_seconds: float = 600) -> Iterator[Arena]:
    """What is not given is started, and gone afterwards."""
    with servers(postgres, kafka) as started:
        yield Arena(
            admin_dsn=started.dsn,
            bootstrap_servers=started.bootstrap_servers,
            broker_pid=started.kafka.pid if started.kafka else None,
            programs=started.postgres.programs if started.postgres else None,
            patience_seconds=patience_seconds,
        )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
