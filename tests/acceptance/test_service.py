"""The service, from outside: signals, standing by, HTTP, logs."""

import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from confluent_kafka.admin import AdminClient

from acceptance.conftest import StartRelay
from cdc_outbox.demo.relay import RelayProcess
from support import command
from support.observing import delivered_ids, load, readyz, readyz_state, wait_for_load
from support.waiting import wait_until
from support.world import World, create_topic, read_topic


def end_three_times(
    world: World, start_relay: StartRelay, end: Callable[[RelayProcess], None]
) -> tuple[list[str], list[str]]:
    """Start and ``end`` a relay three times under load, then let one catch up: ids committed, ids delivered."""
    world.migrate()
    aggregate_type = world.create_topic()
    with load(world, aggregate_type) as ids:
        for _ in range(3):
            relay = start_relay()
            wait_for_load(world, ids)
            end(relay)
    start_relay()
    world.wait_until_confirmed()
    return ids, delivered_ids(world, aggregate_type, len(ids))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.rest
def test_a_clean_stop_under_load_resends_nothing(world: World, start_relay: StartRelay, number: signal.Signals) -> None:
    def stop(relay: RelayProcess) -> None:
        relay.process.send_signal(number)
        assert relay.process.wait(20) == 0

    committed, delivered = end_three_times(world, start_relay, stop)
    assert sorted(delivered) == sorted(committed)


def test_a_killed_relay_loses_nothing(world: World, start_relay: StartRelay) -> None:
    def kill(relay: RelayProcess) -> None:
        relay.process.kill()
        relay.process.wait()

    committed, delivered = end_three_times(world, start_relay, kill)
    assert set(delivered) == set(committed)
    assert len(delivered) - len(committed) <= 3 * 50, "only what was in flight is sent again"


def test_the_standby_takes_over(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    leader = start_relay()
    standby = start_relay(wait=False)
    wait_until(lambda: readyz_state(standby) == "standby", "the second stands by")
    assert readyz(standby)["status"] == 503
    assert standby.metric('cdc_outbox_state{state="standby"}') == 1
    first = world.insert(aggregate_type)
    world.wait_until_confirmed()
    leader.process.send_signal(signal.SIGTERM)
    assert leader.process.wait(20) == 0
    wait_until(lambda: readyz_state(standby) == "streaming", "it takes over", timeout_seconds=5)
    second = world.insert(aggregate_type)
    world.wait_until_confirmed()
    assert delivered_ids(world, aggregate_type, 2) == [first, second]


def test_a_standby_that_takes_over_looks_again_what_is_there(world: World, start_relay: StartRelay) -> None:
    """Of what it saw when it began to wait a topic may be gone."""
    world.migrate()
    aggregate_type = world.create_topic()
    topic = f"outbox.{aggregate_type}"
    created = {"CDC_OUTBOX_KAFKA__CREATE_TOPICS": "true"}
    leader = start_relay(**created)
    standby = start_relay(wait=False, **created)
    wait_until(lambda: readyz_state(standby) == "standby", "the second stands by")
    admin = AdminClient({"bootstrap.servers": world.bootstrap_servers})
    admin.delete_topics([topic])[topic].result()
    wait_until(lambda: topic not in admin.list_topics(timeout=5).topics, "it is gone")
    leader.process.send_signal(signal.SIGTERM)
    assert leader.process.wait(20) == 0
    wait_until(lambda: readyz_state(standby) == "streaming", "it takes over", timeout_seconds=5)
    event = world.insert(aggregate_type)
    world.wait_until_confirmed()
    assert delivered_ids(world, aggregate_type, 1) == [event]


def test_a_standby_ends_at_once(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    start_relay()
    standby = start_relay(wait=False)
    wait_until(lambda: readyz_state(standby) == "standby", "the second stands by")
    standby.process.send_signal(signal.SIGTERM)
    assert standby.process.wait(5) == 0


def test_a_taken_http_port_is_said_and_taken_over(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    leader = start_relay()
    standby = start_relay(wait=False, CDC_OUTBOX_HTTP__LISTEN=leader.address)
    standby.address = leader.address
    wait_until(lambda: "http_address_in_use" in standby.said(), "it says so")
    leader.process.send_signal(signal.SIGTERM)
    assert leader.process.wait(20) == 0
    wait_until(lambda: readyz_state(standby) == "streaming", "slot and port are taken over")


def test_http(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    relay = start_relay()
    world.insert(aggregate_type)
    world.wait_until_confirmed()
    assert urlopen(f"http://{relay.address}/healthz").read() == b"ok\n"
    report = readyz(relay)
    assert (report["status"], report["ready"], report["state"], report["slot"]) == (200, True, "streaming", world.slot)
    with pytest.raises(HTTPError, match="404"):
        urlopen(f"http://{relay.address}/nope")
    assert relay.metric(f'cdc_outbox_events_published_total{{topic="outbox.{aggregate_type}"}}') == 1
    assert relay.metric("cdc_outbox_commit_to_ack_seconds_count") == 1
    assert relay.metric("cdc_outbox_events_in_flight") == 0
    assert relay.metric('cdc_outbox_state{state="streaming"}') == 1
    # NaN before that, which is not 0 or more
    wait_until(
        lambda: (lag := relay.metric("cdc_outbox_slot_lag_bytes")) is not None and lag >= 0, "the monitor has looked"
    )


@pytest.mark.rest
def test_who_hangs_up_before_the_answer_leaves_no_trace(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    relay = start_relay()
    host, port = relay.address.split(":")
    for _ in range(20):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, at once
    assert readyz_state(relay) == "streaming"
    assert "Error" not in relay.said()


def test_nothing_but_our_lines_is_logged_when_a_topic_is_created(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    relay = start_relay(CDC_OUTBOX_LOG_FORMAT="json", CDC_OUTBOX_KAFKA__CREATE_TOPICS="true")
    world.insert(f"{world.name}_new")
    world.wait_until_confirmed()
    assert [json.loads(line)["level"] for line in relay.said().splitlines()] == ["info", "info"]


def test_logs_for_machines(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    relay = start_relay(CDC_OUTBOX_LOG_FORMAT="json")
    relay.process.send_signal(signal.SIGTERM)
    assert relay.process.wait(20) == 0
    events = [json.loads(line)["event"] for line in relay.said().splitlines()]
    assert {"http_listening", "streaming", "stopped"} == set(events)


_WAITING = """
import time
from cdc_outbox.service.shutdown import Shutdown
Shutdown(60).install()
print("up", flush=True)
time.sleep(60)
"""


def test_a_second_signal_ends_at_once() -> None:
    with subprocess.Popen([sys.executable, "-c", _WAITING], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == -signal.SIGTERM


def test_nohup_is_left_alone(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited
    try:
        relay = start_relay()
    finally:
        signal.signal(signal.SIGHUP, before)
    aggregate_type = world.create_topic()
    relay.process.send_signal(signal.SIGHUP)
    event_id = world.insert(aggregate_type)
    world.wait_until_confirmed()
    assert delivered_ids(world, aggregate_type, 1) == [event_id]
    assert not relay.ended


@pytest.mark.parametrize("trouble", ["full", "nobody reads"])
@pytest.mark.parametrize("log_format", ["console", "json"])
@pytest.mark.rest
def test_a_log_that_cannot_be_written_ends_nothing(world: World, tmp_path: Path, trouble: str, log_format: str) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    if trouble == "full":
        stderr = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stderr = os.pipe()
        os.close(reader)

    def run(*arguments: str, **settings: str) -> subprocess.Popen[bytes]:
        environment = command.environment({**world.environment, "CDC_OUTBOX_LOG_FORMAT": log_format, **settings})
        return subprocess.Popen([command.PROGRAM, *arguments], env=environment, stderr=stderr, cwd=tmp_path)

    try:
        relay = run("run", CDC_OUTBOX_RELAY__ON_POISON="dead-letter")
        event_id = world.insert(aggregate_type)
        world.insert("no topic")
        world.wait_until_confirmed()
        assert delivered_ids(world, aggregate_type, 1) == [event_id]
        relay.terminate()
        assert relay.wait(20) == 0
        assert run("run", CDC_OUTBOX_POSTGRES__SLOT="nope").wait(20) == 3
        assert run("status", CDC_OUTBOX_KAFKA__NOPE="x").wait(20) == 2
    finally:
        os.close(stderr)


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_standard_streams_may_be_closed(world: World, log_format: str) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    environment = command.environment({**world.environment, "CDC_OUTBOX_LOG_FORMAT": log_format})
    relay = subprocess.Popen(["/bin/sh", "-c", f"exec {command.PROGRAM} run <&- >&- 2>&-"], env=environment)
    try:
        event_id = world.insert(aggregate_type)
        world.wait_until_confirmed()
        assert delivered_ids(world, aggregate_type, 1) == [event_id]
    finally:
        relay.terminate()
    assert relay.wait(20) == 0


@pytest.mark.rest
def test_a_full_standard_output_is_said(world: World) -> None:
    world.migrate()
    with Path("/dev/full").open("w") as full:
        for verb in (
            ["status"],
            ["status", "--json"],
            ["config", "show"],
            ["--help"],
            ["--version"],
            ["topics", "create", "--help"],
            ["migrate", "sql"],
            ["dead-letters", "list"],
        ):
            done = subprocess.run(
                [command.PROGRAM, *verb],
                env=command.environment(world.environment),
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
            assert (done.returncode, done.stderr) == (
                3,
                "error: standard output cannot be written to: no space left on device\n",
            ), verb


@pytest.mark.rest
def test_a_client_that_says_nothing_is_let_go(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    relay = start_relay()
    host, port = relay.address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(b"GET /healthz HT")
        assert client.recv(100) == b"", "after a while"
    assert "Traceback" not in relay.said()


@pytest.mark.rest
def test_a_canary_comes_by_until_the_publication_loses_it(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    topic = f"{world.name}-canary"
    create_topic(world.bootstrap_servers, topic)
    settings = {"CDC_OUTBOX_CANARY__EVERY_SECONDS": "0.5", "CDC_OUTBOX_CANARY__TOPIC": topic}
    relay = start_relay(**settings)
    records = read_topic(world.bootstrap_servers, topic, 3)
    assert {record.key() for record in records} == {world.slot.encode()}
    standby = start_relay(wait=False, **settings)
    wait_until(lambda: readyz_state(standby) == "standby", "it stands by")

    def age(process: RelayProcess) -> float:
        seconds = process.metric("cdc_outbox_canary_age_seconds")
        assert seconds is not None
        return seconds

    assert age(relay) < 3
    assert math.isnan(age(standby))
    assert world.db.execute("SELECT count(*) FROM cdc_outbox.canary").fetchone() == (0,)
    world.db.execute("ALTER PUBLICATION cdc_outbox DROP TABLE cdc_outbox.canary")
    wait_until(lambda: age(relay) > 3, "the canary is missed")
    world.migrate()
    wait_until(lambda: age(relay) < 3, "the canary is back")


def test_a_canary_makes_its_topic(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    topic = f"{world.name}-canary"
    start_relay(CDC_OUTBOX_CANARY__EVERY_SECONDS="0.2", CDC_OUTBOX_CANARY__TOPIC=topic)
    assert read_topic(world.bootstrap_servers, topic, 2)


@pytest.mark.parametrize("trouble", ["its topic refuses it", "its name is no topic's", "its table is gone"])
@pytest.mark.rest
def test_a_canary_that_cannot_be_sent_is_missed_and_events_flow(
    world: World, start_relay: StartRelay, trouble: str
) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    topic = f"{world.name}-canary"
    if trouble == "its topic refuses it":
        create_topic(world.bootstrap_servers, topic, partitions=1, **{"max.message.bytes": "10"})
    elif trouble == "its name is no topic's":
        topic = ".."
    else:
        world.db.execute("DROP TABLE cdc_outbox.canary")
    relay = start_relay(CDC_OUTBOX_CANARY__EVERY_SECONDS="0.2", CDC_OUTBOX_CANARY__TOPIC=topic)
    wait_until(lambda: "no_canary" in relay.said(), "it is said")
    wait_until(lambda: (relay.metric("cdc_outbox_canary_age_seconds") or 0) > 2, "and missed")
    wait_until(lambda: readyz(relay)["status"] == 200, "it streams")
    event_ids = [world.insert(aggregate_type) for _ in range(3)]
    world.wait_until_confirmed()
    assert delivered_ids(world, aggregate_type, 3) == event_ids
    assert relay.said().count("no_canary") == 1
