"""Checks ask what is streamed: at the start, by the doctor, and of what somebody else has in the database."""

import json

import pytest

from support import command
from support.world import World


def doctor(world: World) -> dict[str, tuple[str, str]]:
    """What it found, and its hint, by check; of several of one check the worst."""
    own_topic = {"CDC_OUTBOX_KAFKA__TOPIC": f"outbox.{world.name}_event"}  # what other tests left is none of ours
    done = command.run({**world.environment, **own_topic}, "doctor", "--json")
    findings = sorted(
        json.loads(done.out)["findings"], key=lambda finding: ["ok", "warning", "failed"].index(finding["state"])
    )
    return {finding["check"]: (f"{finding['state']}: {finding['found']}", finding["hint"]) for finding in findings}


def refused(world: World, said: str, hint: str) -> None:
    """By `run`, and by the doctor in the same words."""
    done = command.run(world.environment, "run")
    assert done.exit_code == 3
    assert said in done.error
    assert hint in done.error
    found, told = doctor(world)["publication"]
    assert f"failed: {found.removeprefix('failed: ')}" == found
    assert said in found
    assert hint in told


def test_a_column_list_without_headers(old_and_new_world: World) -> None:
    world = old_and_new_world
    world.migrate()
    world.db.execute("ALTER PUBLICATION cdc_outbox DROP TABLE outbox")
    world.db.execute(
        "ALTER PUBLICATION cdc_outbox ADD TABLE outbox (id, aggregate_type, aggregate_id, event_type, payload)"
    )
    refused(world, "does not send column 'headers' of public.outbox", 'ADD TABLE "public"."outbox"')


def test_a_generated_column(old_and_new_world: World) -> None:
    world = old_and_new_world
    world.db.execute(
        "CREATE TABLE outbox (id uuid, aggregate_id text, event_type text, payload json,"
        " aggregate_type text GENERATED ALWAYS AS (split_part(event_type, '.', 1)) STORED)"
    )
    world.migrate()
    refused(
        world, "does not send column 'aggregate_type' of public.outbox, wanted for aggregate_type: it is generated", ""
    )
    if world.db.info.server_version >= 180000:
        world.db.execute("ALTER PUBLICATION cdc_outbox SET (publish_generated_columns = stored)")
        assert doctor(world)["publication"][0].startswith("ok: ")


def test_a_partitioned_outbox_of_the_user_s(old_and_new_world: World) -> None:
    world = old_and_new_world
    world.db.execute(
        "CREATE TABLE outbox (id uuid, aggregate_type text DEFAULT 'event', aggregate_id text, event_type text,"
        " payload json, sent bool DEFAULT false) PARTITION BY LIST (sent)"
    )
    world.db.execute("CREATE TABLE outbox_0 PARTITION OF outbox FOR VALUES IN (false)")
    world.db.execute("CREATE TABLE outbox_1 PARTITION OF outbox DEFAULT")
    assert command.run(world.environment, "migrate", "up").exit_code == 0
    found = doctor(world)
    assert found["publication"][0].startswith("ok: ")
    assert "sends it again" in found["partitioning"][0]


def test_a_slot_with_two_phase(old_and_new_world: World) -> None:
    world = old_and_new_world
    world.migrate()
    world.db.execute("SELECT pg_drop_replication_slot(%s)", [world.slot])
    world.db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput', false, true)", [world.slot])
    done = command.run(world.environment, "run")
    assert (done.exit_code, "has two_phase on" in done.error) == (3, True)
    assert "look first: SELECT" in done.error


@pytest.mark.parametrize("publish", ["insert, update, delete, truncate", "delete"])
@pytest.mark.rest
def test_somebody_else_s_publication_of_all_tables_stops_nobody(old_and_new_world: World, publish: str) -> None:
    world = old_and_new_world
    world.settings["CDC_OUTBOX_RELAY__ON_POISON"] = "dead-letter"
    world.db.execute(f"CREATE PUBLICATION others FOR ALL TABLES WITH (publish = '{publish}')".encode())
    aggregate_type = world.create_topic()
    done = {
        arguments: command.run(world.environment, *arguments) for arguments in [("migrate", "up"), ("migrate", "up")]
    }
    assert {run.exit_code for run in done.values()} == {0}
    world.insert(aggregate_type)
    world.insert("no topic")
    run_until_confirmed(world)
    run_until_confirmed(world)
    verbs: list[tuple[str, ...]] = [
        ("dead-letters", "list"),
        ("dead-letters", "show", "1"),
        ("dead-letters", "redrive", "1", "--topic", f"outbox.{aggregate_type}", "--no-wait"),
        ("status",),
        ("status", "--stuck", "0s"),
        ("migrate", "status"),
        ("migrate", "sql"),
        ("migrate", "up"),
        ("config", "show"),
    ]
    for arguments in verbs:
        run = command.run(world.environment, *arguments)
        assert (arguments, run.exit_code, run.err) == (arguments, 0, "")
    run_until_confirmed(world)
    assert len(world.read(aggregate_type, 2)) == 2
    world.insert("no topic")
    run_until_confirmed(world)
    for arguments in (("dead-letters", "discard", "2", "--reason", "test"), ("prune", "--older-than", "0s")):
        run = command.run(world.environment, *arguments)
        assert (arguments, run.exit_code, run.err) == (arguments, 0, "")
    found = doctor(world)
    assert not [name for name, (said, _) in found.items() if said.startswith("failed") and name != "free walsenders"]


def run_until_confirmed(world: World) -> None:
    """A whole life of a relay: its notes are thinned out too."""
    with command.start(world.environment, "run") as relay:
        try:
            world.wait_until_confirmed()
        finally:
            relay.terminate()
            assert relay.wait(20) == 0
