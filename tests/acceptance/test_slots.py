"""Slots belong to the server: whose one is, what would be lost with it, and how to look, before anybody drops it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cdc_outbox
from support import command
from support.world import World, make_world


@pytest.fixture
def neighbour(world: World, postgres: str, kafka: str) -> Iterator[World]:
    """Another database of the same server."""
    with make_world(postgres, kafka) as made:
        yield made


def test_the_slot_of_another_database_is_let_alone(world: World, neighbour: World) -> None:
    neighbour.migrate()
    world.settings["CDC_OUTBOX_POSTGRES__SLOT"] = neighbour.slot
    for verb in (("migrate", "up"), ("migrate", "sql"), ("run",)):
        done = command.run(world.environment, *verb)
        assert done.exit_code == 3
        if verb != ("run",):
            said = f"replication slot '{neighbour.slot}' belongs to database '{neighbour.name}', not to '{world.name}'"
            assert said in done.error
            assert "let it be, and name another with postgres.slot" in done.error
        assert "drop" not in done.error
    own = f"{neighbour.slot}_{world.name}"
    assert f"for example {own}" in command.run(world.environment, "migrate", "up").error
    world.settings["CDC_OUTBOX_POSTGRES__SLOT"] = own
    assert command.run(world.environment, "migrate", "up").exit_code == 0


def test_a_slot_lost_before_the_first_run_is_a_gap(old_and_new_world: World) -> None:
    world = old_and_new_world
    world.migrate()
    world.insert("t")
    world.db.execute("SELECT pg_drop_replication_slot(%s)", [world.slot])
    missing = command.run(world.environment, "run")
    assert missing.exit_code == 3
    assert (
        f"what slot '{world.slot}' of database '{world.name}' had not sent is then in the table only" in missing.error
    )
    assert "look first: SELECT * FROM cdc_outbox.event_status WHERE NOT published" in missing.error
    assert command.run(world.environment, "migrate", "up").exit_code == 0
    done = command.run(world.environment, "run")
    assert done.exit_code == 3
    assert "what was committed between is not in it" in done.error


def test_a_fresh_slot_beside_others_is_no_alarm(old_and_new_world: World) -> None:
    """The oldest slot of a server holds back what all of them seem to hold back."""
    world = old_and_new_world
    other = f"{world.slot}_other"
    world.db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [other])
    for _ in range(3):
        world.db.execute("SELECT pg_current_xact_id()")
    world.migrate()
    done = command.run(world.environment, "doctor")
    assert "publication's age: older than what the slot has yet to read" in done.out


def test_a_publication_made_after_the_slot(old_and_new_world: World) -> None:
    world = old_and_new_world
    world.migrate()
    world.db.execute("DROP PUBLICATION cdc_outbox")
    done = command.run(world.environment, "migrate", "up")
    assert done.exit_code == 3
    assert "name the one that it was made for with postgres.publication" in done.error
    assert f"of database '{world.name}' had not sent is then in the table only" in done.error


def test_no_hint_tells_to_drop_or_make_a_slot_without_saying_what_for() -> None:
    """Every text of the program that speaks of it is one of these, each of which says whose it is and how to look."""
    source = Path(cdc_outbox.__file__).parent
    spoken = [
        (path.name, line.strip())
        for path in sorted(source.rglob("*.py"))
        for line in path.read_text().splitlines()
        if re.search(r'f?".*(drop|pg_drop).*slot', line) and "demo" not in path.parts
    ]
    assert spoken == []
