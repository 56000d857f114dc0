"""Every verb but `run`, as a user calls it."""

import json
import signal
import subprocess
import sys

import pytest
from confluent_kafka.admin import AdminClient

from acceptance.conftest import StartRelay
from support import command
from support.waiting import wait_until
from support.world import World, create_topic

VERBS = [
    "migrate",
    "migrate up",
    "migrate status",
    "migrate sql",
    "migrate inbox",
    "migrate inbox up",
    "migrate inbox sql",
    "run",
    "tail",
    "status",
    "doctor",
    "config show",
    "demo",
]
VERBS += [f"dead-letters{verb}" for verb in ("", " list", " show", " redrive", " discard")]


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help(verb: str) -> None:
    done = command.run({}, *verb.split(), "--help")
    assert done.exit_code == 0
    assert done.out.startswith("Usage: ")
    assert max(map(len, done.out.splitlines())) <= 80


def test_version() -> None:
    assert command.run({}, "--version").out.startswith("cdc-outbox, version ")


@pytest.mark.parametrize("arguments", [["nope"], ["--log-format", "xml", "run"], ["run", "--nope"]])
def test_usage_errors(arguments: list[str]) -> None:
    assert command.run({}, *arguments).exit_code == 2


@pytest.mark.parametrize("verb", ["run", "tail", "status", "doctor", "migrate up", "config show"])
def test_without_a_configuration_the_missing_key_is_named(verb: str) -> None:
    done = command.run({}, *verb.split())
    assert done.exit_code == 2
    assert "postgres.dsn is required -- set CDC_OUTBOX_POSTGRES__DSN" in done.error


def test_what_a_library_cleans_up_at_exit_cannot_change_the_exit_code() -> None:
    """OpenSSL's clearing away at exit has crashed threads of librdkafka's. Here it is a function that ends with 99."""
    script = """if True:
        import atexit, ctypes, os, sys
        from cdc_outbox.__main__ import run

        clears_away = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: os._exit(99))
        ctypes.CDLL(None).__cxa_atexit(clears_away, None, None)
        atexit.register(print, "the last spans")
        sys.argv[1:] = ["run"]
        run()
    """
    done = subprocess.run(
        [sys.executable, "-c", script], env=command.environment({}), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == "the last spans\n"


def test_errors_for_machines() -> None:
    done = command.run({}, "--log-format", "json", "run")
    assert done.exit_code == 2
    failed = json.loads(done.err)
    assert (failed["event"], failed["exit_code"]) == ("failed", 2)
    assert failed["error"] == "postgres.dsn is required"


def test_migrate(world: World) -> None:
    script = command.run(world.environment, "migrate", "sql")
    assert script.exit_code == 0
    assert script.out.index("CREATE PUBLICATION") < script.out.index("pg_create_logical_replication_slot")
    pending = json.loads(command.run(world.environment, "migrate", "status", "--json").out)
    assert {entry["state"] for entry in pending} == {"pending"}
    up = command.run(world.environment, "migrate", "up")
    assert (up.exit_code, len(up.out.splitlines())) == (0, len(pending) + 3)  # slot, view and rights
    assert command.run(world.environment, "migrate", "up").out == "nothing to do\n"
    assert command.run(world.environment, "migrate", "sql").out.startswith("-- set the rights of the roles\n")
    table = command.run(world.environment, "migrate", "status")
    assert "0002_outbox_table.sql" in table.out
    assert "applied" in table.out


def test_status(world: World, start_relay: StartRelay) -> None:
    missing = command.run(world.environment, "status")
    assert (missing.exit_code, "does not exist" in missing.error) == (3, True)
    world.migrate()
    alone = json.loads(command.run(world.environment, "status", "--json").out)
    assert alone["relay"] is None
    assert (alone["slot"]["name"], alone["slot"]["active_pid"]) == (world.slot, None)
    relay = start_relay()
    settings = {**world.environment, "CDC_OUTBOX_HTTP__LISTEN": relay.address}
    both = json.loads(command.run(settings, "status", "--json").out)
    assert both["relay"]["state"] == "streaming"
    assert both["slot"]["active_pid"]
    shown = command.run(settings, "status").out
    assert "streaming" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_tail(world: World) -> None:
    world.migrate()
    before = world.confirmed_lsn()
    process = command.start(world.environment, "tail", "--json")
    assert process.stdout
    wait_until(
        lambda: world.db.execute("SELECT FROM pg_replication_slots WHERE temporary AND active").rowcount, "it listens"
    )
    event_id = world.insert("order", "o-1", '{"a":  "ü"}', headers='{"h": "1"}')
    world.insert("order", "o-2", None)
    first, second = json.loads(process.stdout.readline()), json.loads(process.stdout.readline())
    assert first.pop("timestamp_ms") > 1_700_000_000_000
    assert first == {
        "topic": "outbox.order",
        "key": "o-1",
        "headers": {"id": event_id, "type": "tested", "h": "1"},
        "value": '{"a":  "ü"}',
    }
    assert (second["key"], second["value"]) == ("o-2", None)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    process.communicate()
    assert world.confirmed_lsn() == before, "the real slot is not touched"
    gone = "SELECT FROM pg_replication_slots WHERE database = %s AND temporary"
    wait_until(lambda: not world.db.execute(gone, [world.name]).rowcount, "the temporary slot is gone")


def test_config_show(world: World) -> None:
    done = command.run({**world.environment, "CDC_OUTBOX_KAFKA__PRODUCER__SASL_PASSWORD": "hunter2"}, "config", "show")
    assert done.exit_code == 0
    assert "password=***" in done.out
    assert f"dbname={world.name}" in done.out
    assert 'kafka.producer.sasl.password = "***"' in done.out
    assert f'postgres.slot = "{world.slot}"' in done.out
    assert "hunter2" not in done.out


@pytest.mark.parametrize("calm", [["--calm"], []], ids=["calm", "with deaths"])
@pytest.mark.rest
def test_demo_on_given_servers_leaves_nothing(world: World, calm: list[str]) -> None:
    servers = ["--postgres", world.admin_dsn, "--kafka", world.bootstrap_servers]
    done = command.run({}, "demo", "--seconds", "3", "--json", *calm, *servers, timeout_seconds=90)
    assert done.exit_code == 0, (done.err, json.loads(done.out or "{}"))
    verdict = json.loads(done.out)
    assert verdict["good"]
    assert verdict["committed"] == verdict["delivered"] > 100
    assert verdict["rolled_back"] > 0
    assert (verdict["lost"], verdict["phantom"], verdict["out_of_order"]) == (0, 0, 0)
    assert verdict["effects"] == verdict["committed"]
    assert (verdict["effects_missing"], verdict["effects_doubled"], verdict["effects_out_of_order"]) == (0, 0, 0)
    assert verdict["kills"] == (0 if calm else 2)
    if calm:
        assert verdict["duplicates"] == 0
    admin = AdminClient({"bootstrap.servers": world.bootstrap_servers})
    groups = [group.group_id for group in admin.list_consumer_groups().result().valid]
    assert not [group for group in groups if group.startswith("cdc_outbox_demo")]
    assert not [topic for topic in admin.list_topics(timeout=10).topics if topic.startswith("cdc_outbox_demo")]
    left = world.db.execute("SELECT datname FROM pg_database WHERE datname LIKE 'cdc_outbox_demo%'").fetchall()
    slots = world.db.execute("SELECT slot_name FROM pg_replication_slots WHERE slot_name LIKE 'cdc_outbox_demo%'")
    assert (left, slots.fetchall()) == ([], [])


def test_demo_interrupted_leaves_nothing(world: World) -> None:
    process = command.start(
        {}, "demo", "--seconds", "60", "--postgres", world.admin_dsn, "--kafka", world.bootstrap_servers
    )
    demo_slots = "SELECT FROM pg_replication_slots WHERE slot_name LIKE 'cdc_outbox_demo%'"
    wait_until(lambda: world.db.execute(f"{demo_slots} AND active").rowcount, "the relay streams")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 4
    assert "error: interrupted" in err
    assert not world.db.execute(demo_slots).rowcount


def test_doctor(world: World) -> None:
    world.migrate()
    create_topic(world.bootstrap_servers, f"outbox.{world.name}")
    settings = {**world.environment, "CDC_OUTBOX_KAFKA__TOPIC": f"outbox.{world.name}"}
    done = command.run(settings, "doctor")
    assert done.exit_code == 0, done
    assert "     ok  slot: " in done.out
    assert "warning  role: postgres is a superuser" in done.out
    assert " 0 failed" in done.out
    world.db.execute("DROP PUBLICATION cdc_outbox")
    without_broker = {key: value for key, value in settings.items() if "BOOTSTRAP" not in key}
    assert command.run(without_broker, "doctor").exit_code == 2
    done = command.run(settings, "doctor", "--json")
    assert done.exit_code == 4
    document = json.loads(done.out)
    assert done.error == f"error: 1 of {len(document['findings'])} checks failed"
    failed = [finding for finding in document["findings"] if finding["state"] == "failed"]
    assert [finding["check"] for finding in failed] == ["publication"]
    assert failed[0]["hint"].endswith("then run: cdc-outbox migrate up")
