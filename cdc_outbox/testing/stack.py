"""The stack that tests run against: PostgreSQL, Kafka and a relay, real ones. Needs the whole of cdc-outbox."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cdc_outbox.demo.relay import RelayProcess
from cdc_outbox.demo.scene import made_scene, unique_name
from cdc_outbox.demo.stack import servers

POSTGRES_ENV: Final = "TEST_POSTGRES_DSN"
KAFKA_ENV: Final = "TEST_KAFKA_BOOTSTRAP_SERVERS"


@dataclass(frozen=True, slots=True)
class Stack:
    #: of a database with outbox and inbox; it is the relay's, the application's and the consumer's
    dsn: str
    bootstrap_servers: str
    #: host:port, for /readyz and /metrics
    relay_address: str


@contextmanager
def running_stack(settings: Mapping[str, str], folder: Path) -> Iterator[Stack]:
    """``settings`` are the relay's, on top of where it is; its log goes into ``folder``.

    Raises ConfigurationError if no server is to be had, CheckFailed if the relay does not start.
    """
    with (
        servers(os.environ.get(POSTGRES_ENV), os.environ.get(KAFKA_ENV)) as started,
        made_scene(started.dsn, started.bootstrap_servers, unique_name("cdc_outbox_test"), settings) as scene,
        RelayProcess(scene.environment, folder / "relay.log") as relay,
    ):
        relay.wait_until_ready()
        yield Stack(scene.dsn, scene.bootstrap_servers, relay.address)
