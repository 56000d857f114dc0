from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cdc_outbox.demo.relay import RelayProcess
from cdc_outbox.inbox import schema as inbox_sql
from support.applications import Application, Psycopg, Start
from support.consuming import Topic, make_topic
from support.dead_letters import small
from support.policies import OPEN, STRICT
from support.relays import end_all
from support.world import World, create_topic

StartRelay = Callable[..., RelayProcess]


@pytest.fixture
def start_relay(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StartRelay]:
    """Starts a relay for the test's world, with settings on top; ends what the test leaves running,
    and sees how each has ended.
    """
    (name,) = {"world", "old_and_new_world", "every_world"}.intersection(request.fixturenames)
    world: World = request.getfixturevalue(name)
    started: list[RelayProcess] = []

    def start(*, wait: bool = True, **settings: str) -> RelayProcess:
        environment = {**world.environment, **settings}
        if "CDC_OUTBOX_HTTP__LISTEN" not in settings:
            del environment["CDC_OUTBOX_HTTP__LISTEN"]  # the process takes a free port
        relay = RelayProcess(environment, tmp_path / "relay.log")
        relay.start()
        started.append(relay)
        if wait:
            relay.wait_until_ready()
        return relay

    yield start
    end_all(reversed(started), tmp_path / "relay.log")


@pytest.fixture(params=["plain", "partitioned"])
def consuming(request: pytest.FixtureRequest, world: World) -> World:
    """A world with an inbox, and a table for the effects of what is consumed."""
    world.db.execute(inbox_sql.sql(partitioned=request.param == "partitioned").encode())
    world.db.execute("CREATE TABLE effect (message_id text)")
    return world


@pytest.fixture
def start(consuming: World) -> Iterator[Start]:
    started: list[Application] = []

    def start(kind: type[Application] = Psycopg, **options: Any) -> Application:
        started.append(kind(consuming.dsn, **options))
        return started[-1]

    yield start
    for application in started:
        application.close()


@pytest.fixture
def topic(world: World) -> Topic:
    return make_topic(world)


@pytest.fixture
def poisoned(world: World) -> World:
    """Dead letters are asked for, and the topic ``outbox.<name>_small`` takes 3,000 bytes."""
    world.settings["CDC_OUTBOX_RELAY__ON_POISON"] = "dead-letter"
    world.migrate()
    create_topic(world.bootstrap_servers, f"outbox.{small(world)}", partitions=1, **{"max.message.bytes": "3000"})
    return world


@pytest.fixture
def governed(world: World, tmp_path: Path) -> World:
    world.migrate()
    (tmp_path / "strict.toml").write_bytes(STRICT)
    (tmp_path / "open.toml").write_bytes(OPEN)
    return world
