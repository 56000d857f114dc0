"""Outages, from outside: a server that is away is waited for, an operator's work is noticed, nothing is lost."""

import os
import signal
import time
from pathlib import Path

import psycopg
import pytest

from acceptance.conftest import StartRelay
from cdc_outbox.demo.kafka import EmbeddedKafka, fetch_kafka
from cdc_outbox.demo.ports import free_port
from cdc_outbox.demo.postgres import EmbeddedPostgres
from cdc_outbox.demo.relay import RelayProcess
from cdc_outbox.demo.stack import running, server_folder
from support import command
from support.observing import readyz, readyz_state
from support.relays import CheckedRelay
from support.waiting import wait_until
from support.world import World, create_topic, headers_of, read_topic

pytestmark = pytest.mark.rest


SECRET = "hunter2-secret"


@pytest.fixture(scope="module")
def jars() -> list[Path]:
    return fetch_kafka()


def test_a_server_that_is_not_there_is_waited_for(world: World, start_relay: StartRelay) -> None:
    dsn = f"host=127.0.0.1 port={free_port()} user=u password={SECRET}"
    relay = start_relay(wait=False, CDC_OUTBOX_POSTGRES__DSN=dsn)
    wait_until(lambda: readyz_state(relay) == "waiting", "not ready", timeout_seconds=10)
    assert "cannot be reached" in str(readyz(relay)["reason"])
    relay.process.send_signal(signal.SIGTERM)
    assert relay.process.wait(10) == 0
    assert SECRET not in relay.said()


def test_a_lost_walsender_is_replaced(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    relay = start_relay()
    world.insert(aggregate_type)
    world.wait_until_confirmed()
    threads = thread_count(relay)
    for number in range(1, 4):
        query = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s AND active"
        world.db.execute(query, [world.slot])
        world.insert(aggregate_type)
        world.wait_until_confirmed()
        assert relay.metric('cdc_outbox_reconnects_total{side="postgres"}') == number
    assert len(world.read(aggregate_type, 4)) == 4
    assert readyz(relay)["last_errors"]
    assert thread_count(relay) <= threads + 2, "a producer that was replaced is gone, with its three threads or more"


def thread_count(relay: RelayProcess) -> int:
    return len(list(Path(f"/proc/{relay.process.pid}/task").iterdir()))


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        (
            "ALTER PUBLICATION cdc_outbox DROP TABLE outbox",
            "publication 'cdc_outbox' does not list table public.outbox",
        ),
        ("DROP PUBLICATION cdc_outbox", "does not exist"),
    ],
)
def test_a_publication_that_goes_wrong_meanwhile_is_noticed(
    world: World, start_relay: StartRelay, statement: str, named: str
) -> None:
    """The stream itself would only be silent."""
    world.migrate()
    relay = start_relay()
    world.db.execute(statement.encode())
    assert relay.process.wait(10) == 3
    assert named in relay.said()


def test_a_broker_that_goes_and_comes_back(world: World, start_relay: StartRelay, jars: list[Path]) -> None:
    """Not ready with a reason within 10 s, healthy all the time; a stop meanwhile keeps to its deadline; none lost."""
    world.migrate()
    with server_folder() as folder:
        kafka = EmbeddedKafka(folder / "kafka", jars)
        with running(kafka):
            settings = {
                "CDC_OUTBOX_KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
                "CDC_OUTBOX_SERVICE__SHUTDOWN_TIMEOUT_SECONDS": "3",
            }
            create_topic(kafka.bootstrap_servers, "outbox.t")
            relay = start_relay(**settings)
            ids = [world.insert("t")]
            world.wait_until_confirmed()
            kafka.kill()
            # of the partition that is open: the first event to another one would hold up those behind it
            ids += [world.insert("t") for _ in range(500)]
            wait_until(lambda: readyz(relay)["state"] == "waiting", "not ready", timeout_seconds=10)
            assert "broker" in str(readyz(relay)["reason"]) or "Kafka" in str(readyz(relay)["reason"])
            assert readyz(relay)["phase"] == "stalled"
            assert relay.process.poll() is None

            wait_until(lambda: relay.metric("cdc_outbox_events_in_flight") == 500, "all of them wait for Kafka")
            relay.process.send_signal(signal.SIGTERM)
            asked = time.monotonic()
            assert relay.process.wait(10) == 0
            assert time.monotonic() - asked < 6
            assert "shutdown_deadline_passed" in relay.said()
            assert "unacknowledged_events=500" in relay.said()

            relay = start_relay(wait=False, **settings)
            wait_until(lambda: readyz_state(relay) == "waiting", "the next one waits for the broker")
            assert readyz(relay)["phase"] == "backoff"
            kafka.start()
            world.wait_until_confirmed()
            wait_until(lambda: readyz_state(relay) == "streaming", "ready again", timeout_seconds=10)
            messages = read_topic(kafka.bootstrap_servers, "outbox.t", len(ids))
            delivered = {dict(headers_of(message))["id"] for message in messages}
            assert delivered == set(ids)


def test_an_idle_relay_notices_that_the_broker_is_back(world: World, start_relay: StartRelay, jars: list[Path]) -> None:
    world.migrate()
    with server_folder() as folder:
        kafka = EmbeddedKafka(folder / "kafka", jars)
        with running(kafka):
            relay = start_relay(CDC_OUTBOX_KAFKA__BOOTSTRAP_SERVERS=kafka.bootstrap_servers)
            kafka.kill()
            wait_until(lambda: readyz(relay)["state"] == "waiting", "not ready", timeout_seconds=10)
            kafka.start()
            wait_until(lambda: readyz(relay)["state"] == "streaming", "ready again", timeout_seconds=10)


def test_a_stop_while_the_broker_is_frozen_drains(world: World, start_relay: StartRelay, jars: list[Path]) -> None:
    world.migrate()
    with server_folder() as folder:
        kafka = EmbeddedKafka(folder / "kafka", jars)
        with running(kafka):
            create_topic(kafka.bootstrap_servers, "outbox.t")
            relay = start_relay(CDC_OUTBOX_KAFKA__BOOTSTRAP_SERVERS=kafka.bootstrap_servers)
            assert readyz(relay)["phase"] == "reading"
            event_ids = [world.insert("t")]
            world.wait_until_confirmed()
            os.kill(kafka.pid, signal.SIGSTOP)
            try:
                event_ids.append(world.insert("t"))
                wait_until(lambda: relay.metric("cdc_outbox_events_in_flight") == 1, "the event waits for Kafka")
                relay.process.send_signal(signal.SIGTERM)
                wait_until(lambda: readyz(relay)["phase"] == "draining", "it drains", timeout_seconds=5)
                assert readyz(relay)["state"] == "streaming"
            finally:
                os.kill(kafka.pid, signal.SIGCONT)
            assert relay.process.wait(20) == 0
            messages = read_topic(kafka.bootstrap_servers, "outbox.t", 2)
            assert [dict(headers_of(message))["id"] for message in messages] == event_ids


def test_postgresql_stops_fast_while_the_broker_is_down(tmp_path: Path, jars: list[Path]) -> None:
    """It waits for a walsender whose events are not confirmed, unless the relay closes the stream."""
    with server_folder() as folder:
        kafka, postgres = EmbeddedKafka(folder / "kafka", jars), EmbeddedPostgres(folder / "postgres")
        with running(kafka, postgres):
            create_topic(kafka.bootstrap_servers, "outbox.t")
            settings = {
                "CDC_OUTBOX_POSTGRES__DSN": postgres.dsn(),
                "CDC_OUTBOX_KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
                "CDC_OUTBOX_SERVICE__SHUTDOWN_TIMEOUT_SECONDS": "3",
            }
            assert command.run(settings, "migrate", "up").exit_code == 0
            with CheckedRelay(settings, tmp_path / "relay.log") as relay:
                relay.wait_until_ready()
                wait_until(lambda: relay.metric("cdc_outbox_slot_lag_bytes") == 0, "the monitor has looked")
                kafka.kill()
                statement = "INSERT INTO outbox (aggregate_type, aggregate_id, event_type) VALUES ('t', 'a', 'x')"
                with psycopg.connect(postgres.dsn()) as connection:
                    connection.execute(statement)
                wait_until(lambda: relay.metric("cdc_outbox_events_in_flight") == 1, "the event waits for Kafka")
                asked = time.monotonic()
                postgres.stop("fast")
                assert time.monotonic() - asked < 5
                postgres.start()
                kafka.start()
                wait_until(lambda: readyz_state(relay) == "streaming", "ready again", timeout_seconds=15)
                assert len(read_topic(kafka.bootstrap_servers, "outbox.t", 1)) == 1
