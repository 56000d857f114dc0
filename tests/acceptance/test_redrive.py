"""Redrives: asked for by a row, carried out at its place in the stream."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from acceptance.conftest import StartRelay
from support import command
from support.dead_letters import ask_for_redrive, dead_letters, ids_of, redrive, small, too_large
from support.observing import readyz
from support.waiting import wait_until
from support.world import World, headers_of


def relay_until_confirmed(world: World, start_relay: StartRelay) -> None:
    relay = start_relay()
    world.wait_until_confirmed()
    relay.process.terminate()
    assert relay.process.wait(10) == 0


def test_redrive(poisoned: World, start_relay: StartRelay) -> None:
    world = poisoned
    payload = too_large()
    event_id = world.insert(small(world), payload=payload, headers='{"x": "y"}')
    relay = start_relay()
    world.wait_until_confirmed()
    # the cause is still there: refused again, kept, and the relay goes on
    redrive(world, 1)
    (letter,) = dead_letters(world)
    assert (letter["state"], letter["attempts"]) == ("open", 2)
    # fixed
    aggregate_type = world.create_topic()
    before = world.insert(aggregate_type)
    redrive(world, 1, "--topic", f"outbox.{aggregate_type}")
    after = world.insert(aggregate_type)
    messages = world.read(aggregate_type, 3)
    assert [dict(headers_of(message))["id"] for message in messages] == [before, event_id, after], "in its place"
    assert headers_of(messages[1])[2:] == [("x", "y"), ("cdc-outbox-redriven", "1")]
    assert messages[1].value() == payload.encode()
    assert dead_letters(world) == []
    (letter,) = dead_letters(world, "--all")
    assert (letter["state"], letter["attempts"]) == ("redriven", 2)
    # a topic that data must not name, and one that is not there: neither stops the relay
    world.insert(small(world), payload=too_large())
    world.wait_until_confirmed()
    for topic, reason in (("secret", "topic_not_allowed"), ("outbox.nope", "topic_missing")):
        redrive(world, 2, "--topic", topic)
        (letter,) = dead_letters(world)
        assert (letter["state"], letter["reason"]) == ("open", reason)
    assert readyz(relay)["status"] == 200


def test_who_asks_waits_for_the_outcome(poisoned: World, start_relay: StartRelay) -> None:
    world = poisoned
    for _ in range(2):
        world.insert(small(world), payload=too_large())
    relay = start_relay()
    world.wait_until_confirmed()
    verb, topic = ("dead-letters", "redrive"), f"outbox.{world.create_topic()}"
    refused = command.run(world.environment, *verb, "1")
    assert (refused.exit_code, refused.out) == (4, "")
    assert f"dead letter 1 was refused again: topic outbox.{small(world)} refuses it" in refused.error
    assert command.run(world.environment, *verb, "1", "99", "--topic", topic).exit_code == 2
    twice = command.run(world.environment, *verb, "2", "2")
    assert (twice.exit_code, twice.error.count("was refused again")) == (4, 1), "asked for once"
    assert {letter["state"] for letter in dead_letters(world)} == {"open"}, "all are asked for, or none"
    done = command.run(world.environment, *verb, "1", "--topic", topic)
    assert (done.exit_code, done.out) == (0, "dead letter 1 redriven\n")
    relay.process.terminate()
    relay.process.wait(20)
    late = command.run(world.environment, *verb, "2", "--topic", topic, "--timeout", "1s")
    assert late.exit_code == 4
    assert "dead letter 2 was not redriven in time: does the relay run? Request 5 stands" in late.error
    again = command.start(world.environment, *verb, "2", "--topic", topic)
    asked = "SELECT count(*) FROM cdc_outbox.request WHERE parked_id = 2"
    wait_until(lambda: world.db.execute(asked).fetchone() == (2,), "it has asked, too")
    start_relay()
    said = again.communicate(timeout=30)[1]
    assert "dead letter 2 was passed over: it is " in said, "the first request stood"
    assert again.returncode == 4


def test_a_redrive_waits_for_the_relay(poisoned: World, start_relay: StartRelay) -> None:
    """The request is in the log: it is carried out once, whenever the relay comes back."""
    world = poisoned
    event_id = world.insert(small(world), payload=too_large())
    relay_until_confirmed(world, start_relay)
    aggregate_type = world.create_topic()
    ask_for_redrive(world, 1, "--topic", f"outbox.{aggregate_type}")
    (letter,) = dead_letters(world)
    assert letter["state"] == "redriving"
    ask_for_redrive(world, 1)  # the first request may have been lost with its slot
    for _ in range(2):
        relay_until_confirmed(world, start_relay)
        assert ids_of(world, aggregate_type, 1) == [event_id]
    # a request that was carried out before a crash arrives once more
    start_relay()
    world.db.execute(
        "INSERT INTO cdc_outbox.request (slot, kind, parked_id) SELECT %s, 'redrive', unnest(ARRAY[1, 99])",
        [world.slot],
    )
    world.wait_until_confirmed()
    assert ids_of(world, aggregate_type, 1) == [event_id]


def test_a_redrive_by_a_relay_that_has_no_more_rights_than_it_needs(poisoned: World, start_relay: StartRelay) -> None:
    world = poisoned
    event_id = world.insert(small(world), payload=too_large())
    world.db.execute("ALTER ROLE cdc_outbox_relay PASSWORD 'pw'")
    dsn = psycopg.conninfo.make_conninfo(world.dsn, user="cdc_outbox_relay", password="pw")
    start_relay(CDC_OUTBOX_POSTGRES__DSN=dsn)
    world.wait_until_confirmed()
    aggregate_type = world.create_topic()
    redrive(world, 1)
    redrive(world, 1, "--topic", f"outbox.{aggregate_type}")
    assert set(ids_of(world, aggregate_type, 1)) == {event_id}
    assert dead_letters(world) == []


def test_a_redrive_is_carried_out_by_the_relay_of_its_slot(poisoned: World, start_relay: StartRelay) -> None:
    """Two relays side by side, both of which hear of the request."""
    world = poisoned
    event_id = world.insert(small(world), payload=too_large())
    relay_until_confirmed(world, start_relay)
    aggregate_type = world.create_topic()
    other = f"{world.slot}_other"
    world.db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [other])
    refused = command.run({**world.environment, "CDC_OUTBOX_POSTGRES__SLOT": other}, "dead-letters", "redrive", "1")
    assert (refused.exit_code, f"dead letter 1 is that of slot '{world.slot}'" in refused.error) == (2, True)
    ask_for_redrive(world, 1, "--topic", f"outbox.{aggregate_type}")
    start_relay(CDC_OUTBOX_POSTGRES__SLOT=other)
    query = "SELECT confirmed_flush_lsn > %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s"
    end = str(world.current_lsn())
    wait_until(lambda: world.db.execute(query, [end, other]).fetchone() == (True,), "the other has passed it")
    (letter,) = dead_letters(world)
    assert letter["state"] == "redriving"
    start_relay()
    world.wait_until_confirmed()
    assert ids_of(world, aggregate_type, 1) == [event_id]
    assert dead_letters(world) == []


def test_a_redrive_whose_request_waits_for_a_standby(poisoned: World, start_relay: StartRelay) -> None:
    """It comes through the log before any other session sees what the requester wrote, and its rows stay locked."""
    world = poisoned
    event_id = world.insert(small(world), payload=too_large())
    start_relay()
    world.wait_until_confirmed()
    aggregate_type = world.create_topic()
    with psycopg.connect(world.dsn, autocommit=True) as admin, ThreadPoolExecutor() as pool:
        for name in ("ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()"):
            admin.execute(name.encode())
        try:
            environment = {**world.environment, "PGOPTIONS": "-c synchronous_commit=on"}
            arguments = ("dead-letters", "redrive", "--no-wait", "1", "--topic", f"outbox.{aggregate_type}")
            asked = pool.submit(command.run, environment, *arguments)
            assert set(ids_of(world, aggregate_type, 1)) == {event_id}
        finally:
            for name in ("ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()"):
                admin.execute(name.encode())
        assert asked.result().exit_code == 0
    wait_until(lambda: dead_letters(world) == [], "it is recorded", timeout_seconds=30)


@pytest.mark.rest
def test_a_redrive_of_what_never_fits_into_the_queue(poisoned: World, start_relay: StartRelay) -> None:
    world = poisoned
    aggregate_type = world.create_topic()
    event_id = world.insert("no topic", payload=json.dumps({"x": os.urandom(40_000).hex()}))
    relay_until_confirmed(world, start_relay)
    narrow = {"CDC_OUTBOX_KAFKA__PRODUCER__QUEUE_BUFFERING_MAX_KBYTES": "50"}
    relay = start_relay(**narrow)
    redrive(world, 1, "--topic", f"outbox.{aggregate_type}")
    (letter,) = dead_letters(world)
    assert (letter["state"], letter["reason"]) == ("open", "queue_too_small")
    after = world.insert(aggregate_type)
    world.wait_until_confirmed()
    assert readyz(relay)["status"] == 200
    assert ids_of(world, aggregate_type, 1) == [after]
    relay.__exit__(None, None, None)
    start_relay()
    redrive(world, 1, "--topic", f"outbox.{aggregate_type}")
    assert set(ids_of(world, aggregate_type, 2)) == {after, event_id}


@pytest.mark.rest
def test_an_outcome_that_cannot_be_recorded_is_not_confirmed(poisoned: World, start_relay: StartRelay) -> None:
    world = poisoned
    event_id = world.insert(small(world), payload=too_large())
    relay = start_relay()
    world.wait_until_confirmed()
    aggregate_type = world.create_topic()
    world.db.execute("ALTER TABLE cdc_outbox.outcome ADD CONSTRAINT refused CHECK (result <> 'redriven')")
    ask_for_redrive(world, 1, "--topic", f"outbox.{aggregate_type}")
    assert relay.process.wait(20) == 3
    world.db.execute("ALTER TABLE cdc_outbox.outcome DROP CONSTRAINT refused")
    start_relay()
    world.wait_until_confirmed()
    assert set(ids_of(world, aggregate_type, 1)) == {event_id}
    (letter,) = dead_letters(world, "--all")
    assert letter["state"] == "redriven"


def test_redrive_is_refused_if_the_relay_would_not_hear_of_it(poisoned: World, start_relay: StartRelay) -> None:
    world = poisoned
    world.insert("no topic")
    relay_until_confirmed(world, start_relay)
    world.db.execute("ALTER PUBLICATION cdc_outbox DROP TABLE cdc_outbox.request")
    done = command.run(world.environment, "dead-letters", "redrive", "1")
    assert done.exit_code == 3
    assert "does not list cdc_outbox.request: the relay would not hear of it" in done.error
    assert command.run(world.environment, "migrate", "up").out.startswith("add cdc_outbox.request")
    start_relay()
    redrive(world, 1)
