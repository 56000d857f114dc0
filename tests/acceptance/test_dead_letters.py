"""Poison events and their way out, from outside: put away, listed, redriven, discarded; nothing lost or reordered."""

import json
from pathlib import Path

import pytest

from acceptance.conftest import StartRelay
from support import command
from support.dead_letters import count, dead_letters, ids_of, small, too_large
from support.observing import readyz
from support.relays import CheckedRelay
from support.waiting import wait_until
from support.world import World, alter_topic, insert


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
    delivered = ids_of(world, small(world), len(good))
    assert list(dict.fromkeys(delivered)) == good, "in order; what had arrived before a refusal comes again"
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
