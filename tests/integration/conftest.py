"""Fixtures of the integration tests."""

import pytest

from support.settling import let_updates_count_after, make_outbox
from support.world import World


@pytest.fixture
def updates_are_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But where a test is about how long that takes."""
    let_updates_count_after(monkeypatch, 0)


@pytest.fixture
def migrated(every_world: World) -> World:
    """With an outbox whose ids a test can choose to say what they are."""
    make_outbox(every_world)
    every_world.migrate()
    return every_world
