"""Poison events and their way out, from outside: put away, listed, redriven, discarded; nothing lost or reordered."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from acceptance.conftest import StartRelay
from support import command
from support.observing import readyz
from support.relays import CheckedRelay
from support.waiting import wait_until
from support.world import World, alter_topic, create_topic, headers_of, insert


@pytest.fixture
def poisoned(world: World) -> World:
    """Dead letters are asked for, and the topic ``outbox.<name>_small`` takes 3,000 bytes."""
    world.settings["CDC_OUTBOX_RELAY__ON_POISON"] = "dead-letter"
    world.migrate()
    create_topic(world.bootstrap_servers, f"outbox.{small(world)}", partitions=1, **{"max.message.bytes": "3000"})
    return world


def small(world: World) -> str:
    return f"{world.name}_small"


def too_large() -> str:
    """It does not compress either."""
    return json.dumps({"x": os.urandom(3000).hex()})


def dead_letters(world: World, *arguments: str) -> list[dict[str, Any]]:
    done = command.run(world.environment, "dead-letters", "list", "--json", *arguments)
    assert done.exit_code == 0, done
    letters: list[dict[str, Any]] = json.loads(done.out)
    return letters


def ids_of(world: World, aggregate_type: str, count: int) -> list[str | None]:
    return [dict(headers_of(message))["id"] for message in world.read(aggregate_type, count)]


def test_what_can_never_be_published_is_put_away_and_the_rest_flows(poisoned: World, start_relay: StartRelay) -> None:
    """Every kind of poison in one transaction, between events of the same aggregate."""
    world = poisoned
    aggregate_type = world.create_topic()
    good, bad = [], []
    with world.db.transaction():
        for number in range(5):
            good.append(world.insert(small(world), payload=f'{{"number": {number}}}'))
            bad.append(world.insert(small(world), payload=too_large()))
        bad.append(world.insert("no topic"))
        other = world.insert(aggregate_type)
    good.append(world.insert(small(world)))
    relay = start_relay()
    world.wait_until_confirmed()
    assert ids_of(world, small(world), len(good)) == good, "in order, each once"
    assert set(ids_of(world, aggregate_type, 1)) == {other}, "a refusal resends what was in flight elsewhere"
    letters = dead_letters(world)
    assert [letter["event_id"] for letter in letters] == bad, "and no other"
    assert [letter["reason"] for letter in letters] == ["MSG_SIZE_TOO_LARGE"] * 5 + ["topic_not_allowed"]
    assert [letter["ordinal"] for letter in letters] == [2, 4, 6, 8, 10, 11]
    assert {letter["state"] for letter in letters} == {"open"}
    assert readyz(relay)["status"] == 200
    topic = f"outbox.{small(world)}"
    assert relay.metric(f'cdc_outbox_dead_letters_total{{reason="MSG_SIZE_TOO_LARGE",topic="{topic}"}}') == 5
    assert relay.metric('cdc_outbox_dead_letters_total{reason="topic_not_allowed",topic=""}') == 1
    status = json.loads(command.run(world.environment, "status", "--json").out)
    assert status["dead_letters"] == 6


def test_a_dead_letter_is_the_whole_event(poisoned: World, start_relay: StartRelay) -> None:
    world = poisoned
    payload = too_large()
    event_id = world.insert(small(world), "a-7", payload=payload, headers='{"traceparent": "00-1", "odd": "\\u0000"}')
    start_relay()
    world.wait_until_confirmed()
    (row,) = world.db.execute(
        "SELECT event_id, aggregate_type, aggregate_id, event_type, topic, key, headers, payload, ordinal, attempts,"
        " commit_lsn < pg_current_wal_lsn(), created_at >= committed_at FROM cdc_outbox.parked"
    ).fetchall()
    headers = [["id", event_id], ["type", "tested"], ["traceparent", "00-1"], ["odd", "\0"]]
    topic = f"outbox.{small(world)}"
    assert row == (
        event_id, small(world), "a-7", "tested", topic, b"a-7", headers, payload.encode(), 1, 1, True, True,
    )  # fmt: skip
    shown = command.run(world.environment, "dead-letters", "show", "1")
    assert "traceparent: 00-1" in shown.out
    assert payload in shown.out, "on one line"
    document = json.loads(command.run(world.environment, "dead-letters", "show", "1", "--json").out)
    assert document["payload"] == {"text": payload}
    assert document["key"] == {"text": "a-7"}


def test_rows_that_cannot_be_routed(world: World, start_relay: StartRelay) -> None:
    """In a table of the application's own, which allows more than ours does."""
    world.db.execute(
        "CREATE TABLE events (id uuid, kind text, aggregate_id text, event_type text, body bytea, headers text)"
    )
    world.settings |= {
        "CDC_OUTBOX_RELAY__ON_POISON": "dead-letter",
        "CDC_OUTBOX_OUTBOX__TABLE": "events",
        "CDC_OUTBOX_OUTBOX__COLUMNS__PAYLOAD": "body",
        "CDC_OUTBOX_KAFKA__TOPIC": "outbox.{kind}",
    }
    world.migrate(table="events", publication="cdc_outbox")
    kind = world.create_topic()
    row = {"id": None, "kind": kind, "aggregate_id": "a", "event_type": "t", "body": b"\xff\x00", "headers": None}
    insert(world.db, "events", {**row, "aggregate_id": None})
    insert(world.db, "events", {**row, "kind": None})
    insert(world.db, "events", {**row, "headers": "[1]"})
    insert(world.db, "events", row)
    start_relay()
    world.wait_until_confirmed()
    assert [message.value() for message in world.read(kind, 1)] == [b"\xff\x00"]
    letters = dead_letters(world)
    assert [letter["reason"] for letter in letters] == ["aggregate_id_null", "topic_unknown", "headers_unreadable"]
    document = json.loads(command.run(world.environment, "dead-letters", "show", "3", "--json").out)
    assert document["payload"] == {"base64": "/wA="}
    assert ["headers", "[1]"] in document["headers"], "kept as they were"
    # what it lacks can be given
    refused = command.run(world.environment, "dead-letters", "redrive", "1")
    assert (refused.exit_code, "dead letter 1 has no key -- give one with --key" in refused.error) == (2, True)
    assert command.run(world.environment, "dead-letters", "redrive", "1", "--key", "a-9").exit_code == 0
    assert command.run(world.environment, "dead-letters", "redrive", "2", "--topic", f"outbox.{kind}").exit_code == 0
    messages = world.read(kind, 3)
    assert sorted(str(message.key()) for message in messages) == [str(b"a"), str(b"a"), str(b"a-9")]


def relay_until_confirmed(world: World, start_relay: StartRelay) -> None:
    relay = start_relay()
    world.wait_until_confirmed()
    relay.process.terminate()
    assert relay.process.wait(10) == 0


def redrive(world: World, dead_letter_id: int, *arguments: str) -> None:
    done = command.run(world.environment, "dead-letters", "redrive", str(dead_letter_id), *arguments)
    assert done.exit_code == 0, done
    assert done.out == f"redrive of dead letter {dead_letter_id} requested\n"
    world.wait_until_confirmed()


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


def test_a_redrive_waits_for_the_relay(poisoned: World, start_relay: StartRelay) -> None:
    """The request is in the log: it is carried out once, whenever the relay comes back."""
    world = poisoned
    event_id = world.insert(small(world), payload=too_large())
    relay_until_confirmed(world, start_relay)
    aggregate_type = world.create_topic()
    done = command.run(world.environment, "dead-letters", "redrive", "1", "--topic", f"outbox.{aggregate_type}")
    assert done.exit_code == 0
    (letter,) = dead_letters(world)
    assert letter["state"] == "redriving"
    again = command.run(world.environment, "dead-letters", "redrive", "1")
    assert again.exit_code == 0, "the first request may have been lost with its slot"
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
    asked = command.run(world.environment, "dead-letters", "redrive", "1", "--topic", f"outbox.{aggregate_type}")
    assert asked.exit_code == 0
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
            arguments = ("dead-letters", "redrive", "1", "--topic", f"outbox.{aggregate_type}")
            asked = pool.submit(command.run, environment, *arguments)
            assert set(ids_of(world, aggregate_type, 1)) == {event_id}
        finally:
            for name in ("ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()"):
                admin.execute(name.encode())
        assert asked.result().exit_code == 0
    wait_until(lambda: dead_letters(world) == [], "it is recorded", timeout_seconds=30)


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


def test_an_outcome_that_cannot_be_recorded_is_not_confirmed(poisoned: World, start_relay: StartRelay) -> None:
    world = poisoned
    event_id = world.insert(small(world), payload=too_large())
    relay = start_relay()
    world.wait_until_confirmed()
    aggregate_type = world.create_topic()
    world.db.execute("ALTER TABLE cdc_outbox.outcome ADD CONSTRAINT refused CHECK (result <> 'redriven')")
    asked = command.run(world.environment, "dead-letters", "redrive", "1", "--topic", f"outbox.{aggregate_type}")
    assert asked.exit_code == 0
    assert relay.process.wait(20) == 3
    world.db.execute("ALTER TABLE cdc_outbox.outcome DROP CONSTRAINT refused")
    start_relay()
    world.wait_until_confirmed()
    assert set(ids_of(world, aggregate_type, 1)) == {event_id}
    (letter,) = dead_letters(world, "--all")
    assert letter["state"] == "redriven"


def test_discard_and_filters(poisoned: World, start_relay: StartRelay) -> None:
    world = poisoned
    world.insert(small(world), "a-1", payload=too_large())
    world.insert("no topic", "a-2")
    start_relay()
    world.wait_until_confirmed()
    wanted = {
        ("--aggregate", "a-2"): [2],
        ("--type", "tested"): [1, 2],
        ("--type", "other"): [],
        ("--reason", "msg_size_too_large"): [1],
        ("--reason", "topic%"): [2],
        ("--since", "2020-01-01"): [1, 2],
        ("--until", "2020-01-01T00:00:00"): [],
    }
    for arguments, ids in wanted.items():
        found = [1 if letter["reason"] == "MSG_SIZE_TOO_LARGE" else 2 for letter in dead_letters(world, *arguments)]
        assert found == ids, arguments
    table = command.run(world.environment, "dead-letters", "list").out
    assert max(map(len, table.splitlines())) <= 80
    assert command.run(world.environment, "dead-letters", "discard", "1").exit_code == 2, "a reason is asked for"
    done = command.run(world.environment, "dead-letters", "discard", "1", "2", "--reason", "sent by hand")
    assert done.out == "dead letter 1 discarded\ndead letter 2 discarded\n"
    assert command.run(world.environment, "dead-letters", "list").out == "no dead letters that wait for a decision\n"
    assert {(letter["state"], letter["note"]) for letter in dead_letters(world, "--all")} == {
        ("discarded", "sent by hand")
    }
    for verb in ("discard", "redrive", "show"):
        reason = ["--reason", "x"] if verb == "discard" else []
        unknown = command.run(world.environment, "dead-letters", verb, "7", *reason)
        assert (unknown.exit_code, "there is no dead letter 7" in unknown.error) == (2, True)


@pytest.mark.parametrize("moment", ["before the dead letter is kept", "after"])
def test_a_crash_neither_loses_nor_doubles_it(poisoned: World, tmp_path: Path, moment: str) -> None:
    """The relay is killed inside the transaction that keeps the dead letter, or right after it."""
    world = poisoned
    good = [world.insert(small(world))]
    bad = world.insert(small(world), payload=too_large())
    good.append(world.insert(small(world)))
    timing = "BEFORE" if moment.startswith("before") else "AFTER"
    hold(world, f"{timing} INSERT ON cdc_outbox.parked")
    with CheckedRelay(relay_environment(world), tmp_path / "relay.log") as relay:
        wait_until_held(world)
        if moment == "after":
            world.db.execute("SELECT pg_advisory_unlock(7)")
            wait_until(lambda: count(world) == 1, "it is kept")
        relay.process.kill()
        relay.process.wait()
    world.db.execute("SELECT pg_advisory_unlock_all()")
    with CheckedRelay(relay_environment(world), tmp_path / "relay.log"):
        world.wait_until_confirmed()
    assert [letter["event_id"] for letter in dead_letters(world)] == [bad]
    first_seen = list(dict.fromkeys(ids_of(world, small(world), 2)))
    assert first_seen == good


def hold(world: World, event: str, *, when: str = "true") -> None:
    """Let whoever writes there wait until this session gives up the advisory lock."""
    world.db.execute(
        f"""
        CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF {when} THEN PERFORM pg_advisory_lock(7); PERFORM pg_advisory_unlock(7); END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER hold {event} FOR EACH ROW EXECUTE FUNCTION hold();
        """.encode()
    )
    world.db.execute("SELECT pg_advisory_lock(7)")


def wait_until_held(world: World) -> None:
    waiting = """SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted
                    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
    wait_until(lambda: world.db.execute(waiting).rowcount, "the relay is held")


def count(world: World) -> int:
    row = world.db.execute("SELECT count(*) FROM cdc_outbox.parked").fetchone()
    assert row
    return int(row[0])


def relay_environment(world: World) -> dict[str, str]:
    environment = dict(world.environment)
    del environment["CDC_OUTBOX_HTTP__LISTEN"]
    return environment


def test_what_was_put_away_is_not_published_besides(poisoned: World, tmp_path: Path) -> None:
    """The relay is killed before it could confirm, then the limit is raised: the slot sends the event once more."""
    world = poisoned
    bad = world.insert(small(world), payload=too_large())
    good = world.insert(small(world))
    hold(world, "BEFORE INSERT OR UPDATE ON cdc_outbox.confirmation", when="EXISTS (SELECT FROM cdc_outbox.parked)")
    with CheckedRelay(relay_environment(world), tmp_path / "relay.log") as relay:
        wait_until_held(world)
        relay.process.kill()
        relay.process.wait()
    world.db.execute("SELECT pg_advisory_unlock_all()")
    alter_topic(world.bootstrap_servers, f"outbox.{small(world)}", "max.message.bytes", "1000000")
    with CheckedRelay(relay_environment(world), tmp_path / "relay.log"):
        world.wait_until_confirmed()
    assert set(ids_of(world, small(world), 1)) == {good}
    assert [letter["event_id"] for letter in dead_letters(world)] == [bad]


def test_without_the_relays_schema_dead_letters_are_refused(world: World) -> None:
    world.settings["CDC_OUTBOX_RELAY__ON_POISON"] = "dead-letter"
    world.migrate()
    world.db.execute("DROP TABLE cdc_outbox.confirmation")
    done = command.run(world.environment, "run")
    assert done.exit_code == 3
    assert (
        "schema cdc_outbox is not installed, or this role has no right to it -- run `cdc-outbox migrate up`"
        in done.error
    )


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


def test_the_list_fits_a_terminal_and_topics_stay_readable(poisoned: World, start_relay: StartRelay) -> None:
    world = poisoned
    world.settings["CDC_OUTBOX_KAFKA__TOPIC_PATTERN"] = r"outbox\.nothing"
    start_relay()
    world.insert("customer_address", "customer-8d3b2f6a-0000", id="11111111-2222-3333-4444-555555555555")
    world.wait_until_confirmed()
    for width in (80, 120):
        for arguments in ((), ("--all",)):
            listed = command.run({**world.environment, "COLUMNS": str(width)}, "dead-letters", "list", *arguments).out
            assert "outbox.customer_address" in listed, listed
            assert "topic_not_allowed" in listed
            assert max(map(len, listed.splitlines())) <= width
