"""Fixtures of the fault suite: servers of its own behind proxies, and a stage for each scenario.

Everything here is `-m fault`. With `--write-table` the outcomes go into tests/README.md.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cdc_outbox.demo.kafka import EmbeddedKafka, fetch_kafka
from cdc_outbox.demo.ports import free_port
from cdc_outbox.demo.postgres import EmbeddedPostgres
from cdc_outbox.demo.stack import running, server_folder
from fault import table
from fault.proxy import Proxy
from fault.stage import Outcome, Servers, Stage, create_topics
from support.world import make_world

OUTCOMES: pytest.StashKey[list[Outcome]] = pytest.StashKey()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.fault)
            item.add_marker(pytest.mark.timeout(300))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = []


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("--write-table") and exitstatus == 0:
        outcomes = session.config.stash[OUTCOMES]
        table.write(outcomes)


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    with ExitStack() as stack:
        folder = stack.enter_context(server_folder())
        postgres = EmbeddedPostgres(folder / "postgres")
        proxied = free_port()
        kafka = EmbeddedKafka(
            folder / "kafka", fetch_kafka(), settings=kafka_settings(proxied, advertised := free_port())
        )
        stack.enter_context(running(postgres, kafka))
        yield Servers(
            postgres,
            kafka,
            stack.enter_context(Proxy(postgres.port)),
            stack.enter_context(Proxy(proxied, port=advertised)),
        )


def kafka_settings(proxied: int, advertised: int) -> dict[str, str]:
    """A second listener, which clients are told to reach through the proxy."""
    return {
        "listeners": f"PLAINTEXT://127.0.0.1:{{port}},PROXIED://127.0.0.1:{proxied},"
        "CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{{port}},PROXIED://127.0.0.1:{advertised}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "PLAINTEXT",
    }


@pytest.fixture
def stage(servers: Servers, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    with make_world(servers.postgres.dsn(), servers.kafka.bootstrap_servers) as world:
        world.migrate()
        made = Stage(
            servers, world, tmp_path, create_topics(world, "order", "customer"), request.config.stash[OUTCOMES]
        )
        try:
            yield made
        finally:
            for proxy in (servers.postgres_proxy, servers.kafka_proxy):
                proxy.restore()
            made.clean_up()
