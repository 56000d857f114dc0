"""Fixtures shared by the tests, and which of them run. README.md in this folder says how to run them.

Without an option: what takes minutes, on the oldest and the newest PostgreSQL. `--rest`: what takes longer, and every
other PostgreSQL. `-m alone`: what wants the machine for itself, faults and the benchmarks' harness. `--all`: all.
What is named on the command line, or chosen with -m, runs in any case.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

import pytest

from support.services import OTHER_POSTGRES, kafka_bootstrap_servers, other_postgres_dsn, postgres_dsn
from support.world import World, make_world

#: By fixture, the parameters with which a test is of the rest.
_REST = {
    "every_world": OTHER_POSTGRES.keys() - {min(OTHER_POSTGRES)},
    "old_and_new_world": {"15"},
    "consuming": {"partitioned"},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rest", action="store_true", help="Run what is left out otherwise.")
    parser.addoption("--all", action="store_true", help="Run everything.")
    parser.addoption("--write-table", action="store_true", help="Put the fault suite's outcomes into tests/README.md.")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    is_named = config.args_source is pytest.Config.ArgsSource.ARGS
    if is_named or config.getoption("--all") or config.getoption("markexpr"):
        return
    wanted = config.getoption("--rest")
    chosen = [item for item in items if not item.get_closest_marker("alone") and _is_rest(item) == wanted]
    config.hook.pytest_deselected(items=list(set(items).difference(chosen)))
    items[:] = chosen


def _is_rest(item: pytest.Item) -> bool:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return item.get_closest_marker("rest") is not None or any(
        parameters.get(fixture) in values for fixture, values in _REST.items()
    )


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
