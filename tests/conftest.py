"""Fixtures shared by the tests, and which of them run. README.md in this folder says how to run them.

Without an option: what takes minutes, on the oldest and the newest PostgreSQL. `--rest`: faults, the benchmarks'
harness, every other PostgreSQL. `--all`: both. What is named on the command line, or chosen with -m, runs in any case.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

import pytest

from support.services import OTHER_POSTGRES, kafka_bootstrap_servers, other_postgres_dsn, postgres_dsn
from support.world import World, make_world

OLDEST = min(OTHER_POSTGRES)
#: The rest runs on these.
_BETWEEN = OTHER_POSTGRES.keys() - {OLDEST}


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
    left_out = [item for item in items if _is_rest(item) != wanted]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if _is_rest(item) == wanted]


def _is_rest(item: pytest.Item) -> bool:
    parameters = (
        item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
    )
    is_marked = any(item.get_closest_marker(name) for name in ("fault", "rest"))
    return is_marked or any(isinstance(value, str) and value in _BETWEEN for value in parameters)


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


@pytest.fixture(params=["default", OLDEST])
def old_and_new_world(request: pytest.FixtureRequest, kafka: str) -> Iterator[World]:
    """The same test on the newest PostgreSQL and on the oldest."""
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
