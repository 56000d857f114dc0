"""Where PostgreSQL and Kafka come from: addresses in the environment, else Docker, else the embedded stack.

TEST_POSTGRES_DSN            a superuser's DSN; wal_level must be logical
TEST_KAFKA_BOOTSTRAP_SERVERS host:port
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Final

from cdc_outbox.demo.kafka import EmbeddedKafka, fetch_kafka
from cdc_outbox.demo.postgres import EmbeddedPostgres
from cdc_outbox.demo.stack import running, server_folder

POSTGRES_ENV: Final = "TEST_POSTGRES_DSN"
KAFKA_ENV: Final = "TEST_KAFKA_BOOTSTRAP_SERVERS"

#: Other versions that this machine happens to have (Debian's packages): tested too.
OTHER_POSTGRES: Final = tuple(
    path for version in (14, 15, 16, 17) if (path := Path(f"/usr/lib/postgresql/{version}/bin/postgres")).exists()
)


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
def installed_postgres_dsn(program: Path) -> Iterator[str]:
    with server_folder() as folder:
        installed = EmbeddedPostgres(folder / "postgres", bin_folder=program.parent)
        with running(installed):
            yield installed.dsn()


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
