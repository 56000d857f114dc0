"""`topics`, from outside."""

import json
from typing import Any

import pytest

from acceptance.conftest import StartRelay
from support import command
from support.world import World, create_topic, read_topic


@pytest.fixture
def templated(world: World) -> World:
    """Whose topics have the world's name in front."""
    world.settings["CDC_OUTBOX_KAFKA__TOPIC"] = f"{world.name}.{{aggregate_type}}"
    world.migrate()
    return world


def topics(world: World, *types: str) -> dict[str, dict[str, Any]]:
    done = command.run(world.environment, "topics", "list", "--json", *types)
    assert done.exit_code == 0, done
    return {topic["name"]: topic for topic in json.loads(done.out)}


@pytest.mark.rest
def test_a_new_outbox_asks_for_the_topic_of_its_default(templated: World, start_relay: StartRelay) -> None:
    world = templated
    topic = f"{world.name}.event"
    assert topics(world) == {topic: {"name": topic, "waiting": 0, "partitions": None, "refusal": ""}}
    created = command.run(world.environment, "topics", "create", "--partitions", "3", "--replication-factor", "1")
    assert (created.exit_code, created.out) == (0, f"created {topic}\n")
    assert command.run(world.environment, "topics", "create").out == "nothing to do\n"
    assert topics(world)[topic]["partitions"] == 3
    start_relay()
    world.insert("event")
    assert len(read_topic(world.bootstrap_servers, topic, 1)) == 1


def test_what_rows_and_dead_letters_ask_for(templated: World, start_relay: StartRelay) -> None:
    world = templated
    world.settings["CDC_OUTBOX_RELAY__ON_POISON"] = "dead-letter"
    create_topic(world.bootstrap_servers, f"{world.name}.there", partitions=2)
    for aggregate_type in ("there", "there", "missing", "not allowed"):
        world.insert(aggregate_type)
    start_relay()
    world.insert("gone")
    world.wait_until_confirmed()
    world.db.execute("DELETE FROM outbox WHERE aggregate_type = 'gone'")
    listed = topics(world)
    assert {name.removeprefix(world.name): (of["waiting"], of["partitions"]) for name, of in listed.items()} == {
        ".there": (2, 2),
        ".missing": (1, None),
        ".not allowed": (1, None),
        ".gone": (1, None),
        ".event": (0, None),
    }
    assert "is no name that Kafka takes" in listed[f"{world.name}.not allowed"]["refusal"]
    shown = command.run({**world.environment, "COLUMNS": "80"}, "topics", "list").out
    assert "missing" in shown
    assert "not allowed" in shown
    created = command.run(world.environment, "topics", "create")
    assert created.out.splitlines() == [f"created {world.name}.{kind}" for kind in ("event", "gone", "missing")]
    assert "passed over: topic" in created.err


@pytest.mark.rest
def test_types_by_name(templated: World) -> None:
    world = templated
    world.settings["CDC_OUTBOX_POSTGRES__DSN"] = "host=127.0.0.1 port=1"  # the database is not asked
    assert list(topics(world, "order", "invoice")) == [f"{world.name}.invoice", f"{world.name}.order"]
    done = command.run(world.environment, "topics", "create", "order")
    assert done.out == f"created {world.name}.order\n"
    done = command.run(world.environment, "topics", "create", "no blanks")
    assert (done.exit_code, "is no name that Kafka takes" in done.error) == (2, True)
    done = command.run(world.environment, "topics", "create", "invoice", "--replication-factor", "9")
    assert (done.exit_code, "cannot be created" in done.error) == (3, True)


def test_templates_that_need_no_rows_or_more_than_a_type(world: World) -> None:
    world.migrate()
    world.settings["CDC_OUTBOX_KAFKA__TOPIC"] = f"{world.name}.all"
    assert list(topics(world)) == [f"{world.name}.all"]
    world.settings["CDC_OUTBOX_KAFKA__TOPIC"] = f"{world.name}.{{aggregate_type}}.{{event_type}}"
    world.insert("a")
    assert list(topics(world)) == [f"{world.name}.a.tested"]
    done = command.run(world.environment, "topics", "list", "order")
    assert (done.exit_code, "of an aggregate type alone" in done.error) == (2, True)
