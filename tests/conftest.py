"""Fixtures shared by the integration and acceptance tests. README.md in this folder says how to run them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

import pytest

from support.services import OTHER_POSTGRES, kafka_bootstrap_servers, other_postgres_dsn, postgres_dsn
from support.world import World, make_world


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="Put the fault suite's outcomes into tests/README.md.")


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A superuser's DSN."""
    with postgres_dsn() as dsn:
        yield dsn


@pytest.fixture(scope="session")
def kafka() -> Iterator[str]:
    """Bootstrap servers."""
    with kafka_bootstrap_servers() as bootstrap_servers:
        yield bootstrap_servers


@pytest.fixture(scope="session")
def other_postgres() -> Iterator[Callable[[str], str]]:
    """The DSN of another version's server, which is started when it is first asked for."""
    with ExitStack() as stack:
        yield cache(lambda version: stack.enter_context(other_postgres_dsn(version)))


@pytest.fixture
def world(postgres: str, kafka: str) -> Iterator[World]:
    with make_world(postgres, kafka) as made:
        yield made


@pytest.fixture(params=["default", "15"])
def old_and_new_world(request: pytest.FixtureRequest, kafka: str) -> Iterator[World]:
    """The same test on the newest PostgreSQL and on 15, which differ the most in what they send."""
    yield from _world_of(request, kafka)


@pytest.fixture(params=["default", *OTHER_POSTGRES])
def every_world(request: pytest.FixtureRequest, kafka: str) -> Iterator[World]:
    """The same test on every PostgreSQL that the README names."""
    yield from _world_of(request, kafka)


def _world_of(request: pytest.FixtureRequest, kafka: str) -> Iterator[World]:
    if request.param == "default":
        dsn = request.getfixturevalue("postgres")
    else:
        dsn = request.getfixturevalue("other_postgres")(request.param)
    with make_world(dsn, kafka) as made:
        yield made
