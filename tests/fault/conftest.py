"""Fixtures of the fault suite: servers of its own behind proxies, and a stage for each scenario.

Everything here is `-m fault`. With `--write-table` the outcomes go into tests/README.md.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fault import table
from fault.servers import Servers, start_servers
from fault.stage import Outcome, Refusal, Stage, make_stage

OUTCOMES: pytest.StashKey[list[Outcome]] = pytest.StashKey()
REFUSALS: pytest.StashKey[list[Refusal]] = pytest.StashKey()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.fault)
            item.add_marker(pytest.mark.alone)
            item.add_marker(pytest.mark.timeout(300))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = []
    config.stash[REFUSALS] = []


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("--write-table") and exitstatus == 0:
        outcomes, refusals = session.config.stash[OUTCOMES], session.config.stash[REFUSALS]
        table.write(outcomes, refusals)


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    with start_servers() as started:
        yield started


@pytest.fixture
def outcomes(request: pytest.FixtureRequest) -> list[Outcome]:
    """The lines of the table so far; a scenario adds its own."""
    return request.config.stash[OUTCOMES]


@pytest.fixture
def stage(servers: Servers, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    stash = request.config.stash
    with make_stage(servers, tmp_path, stash[OUTCOMES], stash[REFUSALS]) as made:
        yield made
