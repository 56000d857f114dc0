"""Canary secrets, planted wherever there is room for one, and a scan of everything that is printed or served."""

import json
from pathlib import Path
from urllib.request import urlopen

import psycopg
import pytest
from psycopg import conninfo

from acceptance.conftest import StartRelay
from cdc_outbox.demo.ports import free_port
from cdc_outbox.postgres.connection import explain
from support import command
from support.waiting import wait_until
from support.world import World

PLANTED = {
    "password of the DSN": "canary-7f3a-dsn",
    "password of SASL": "canary-7f3a-sasl",
    "payload": "canary-7f3a-payload",
    "header": "canary-7f3a-header",
    "payload of poison": "canary-7f3a-poison",
}


def found_in(text: str) -> list[str]:
    return [place for place, secret in PLANTED.items() if secret in text]


def secretive(world: World) -> dict[str, str]:
    """The relay's settings, with secrets in them; the broker never asks for the one of SASL."""
    password = PLANTED["password of the DSN"]
    world.db.execute(f"ALTER ROLE cdc_outbox_relay PASSWORD '{password}'")
    return {
        **{key: value for key, value in world.environment.items() if not key.endswith("LISTEN")},
        "CDC_OUTBOX_POSTGRES__DSN": conninfo.make_conninfo(world.dsn, user="cdc_outbox_relay", password=password),
        "CDC_OUTBOX_KAFKA__PRODUCER__SASL_PASSWORD": PLANTED["password of SASL"],
        "CDC_OUTBOX_RELAY__ON_POISON": "dead-letter",
        "CDC_OUTBOX_LOG_LEVEL": "debug",
    }


def insert_events(world: World, aggregate_type: str) -> None:
    world.db.execute("ALTER TABLE outbox DROP CONSTRAINT outbox_headers_check")
    headers = json.dumps({"traceparent": PLANTED["header"]})
    world.insert(aggregate_type, payload=json.dumps({"card": PLANTED["payload"]}), headers=headers)
    poison = json.dumps({"card": PLANTED["payload of poison"]})
    world.insert("no topic", payload=poison, headers=headers)
    world.insert(aggregate_type, payload=poison, headers=json.dumps([PLANTED["header"]]))


@pytest.mark.rest
def test_what_a_relay_says_in_good_times_and_bad(world: World, start_relay: StartRelay, tmp_path: Path) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    settings = secretive(world)
    relay = start_relay(**settings, CDC_OUTBOX_LOG_FORMAT="json")
    insert_events(world, aggregate_type)
    wait_until(lambda: waiting(world) == 2, "both are dead letters")
    terminated = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s AND active"
    world.db.execute(terminated, [world.slot])
    wait_until(lambda: relay.metric('cdc_outbox_reconnects_total{side="postgres"}') == 1, "it has reconnected")
    served = [str(relay.readyz()), urlopen(f"http://{relay.address}/metrics").read().decode()]
    relay.__exit__(None, None, None)
    away = {**settings, "CDC_OUTBOX_KAFKA__BOOTSTRAP_SERVERS": f"127.0.0.1:{free_port()}"}
    without_broker = start_relay(wait=False, **away)
    wait_until(lambda: (without_broker.readyz() or {}).get("last_errors"), "it says why it waits")
    without_broker.__exit__(None, None, None)
    said = (tmp_path / "relay.log").read_text()
    assert "dead_lettered" in said
    assert found_in(said + "".join(served)) == []


def waiting(world: World) -> int:
    row = world.db.execute("SELECT count(*) FROM cdc_outbox.parked").fetchone()
    assert row
    return int(row[0])


@pytest.mark.rest
def test_what_the_other_verbs_say(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    settings = secretive(world)
    start_relay(**settings)
    insert_events(world, aggregate_type)
    wait_until(lambda: waiting(world) == 2, "both are dead letters")
    said = {
        verb: command.run(settings, *verb.split())
        for verb in (
            "config show", "config show --json", "doctor", "doctor --json", "status", "status --json", "migrate sql",
            "migrate status", "status --stuck 0s", "prune --older-than 0s", "dead-letters list",
            "dead-letters list --json",
        )
    }  # fmt: skip
    wrong = {**settings, "CDC_OUTBOX_POSTGRES__DSN": settings["CDC_OUTBOX_POSTGRES__DSN"] + " nonsense"}
    refused = {**settings, "CDC_OUTBOX_POSTGRES__DSN": conninfo.make_conninfo(world.dsn, user="nobody_here")}
    said |= {"a DSN that is none": command.run(wrong, "run"), "a role that is not there": command.run(refused, "run")}
    assert {verb: found_in(done.out + done.err) for verb, done in said.items() if found_in(done.out + done.err)} == {}
    assert "*" in said["config show"].out


def test_an_error_of_the_server_s_that_quotes_the_row_is_not_passed_on(world: World) -> None:
    """PostgreSQL names values in DETAIL; of its errors only the primary message is said."""
    world.migrate()
    world.db.execute("CREATE UNIQUE INDEX one ON outbox (event_type)")
    world.insert("t")
    with pytest.raises(psycopg.errors.UniqueViolation) as caught:
        world.insert("t")
    assert "tested" in str(caught.value)
    assert "tested" not in explain(caught.value, "writing").message
