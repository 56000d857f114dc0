"""The service, from outside: signals, exit codes, reconnecting, standing by, HTTP."""

import json
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import psycopg
import pytest
from psycopg import conninfo

from acceptance.conftest import StartRelay
from cdc_outbox.demo.kafka import EmbeddedKafka, fetch_kafka
from cdc_outbox.demo.ports import free_port
from cdc_outbox.demo.postgres import EmbeddedPostgres
from cdc_outbox.demo.relay import RelayProcess
from cdc_outbox.demo.stack import running, server_folder
from support import command
from support.waiting import wait_until
from support.world import World, create_topic, headers_of, read_topic


def readyz(relay: RelayProcess) -> dict[str, object]:
    try:
        with urlopen(f"http://{relay.address}/readyz", timeout=5) as answer:
            return {"status": answer.status, **json.load(answer)}
    except HTTPError as answer:
        return {"status": answer.code, **json.load(answer)}


@contextmanager
def load(world: World, aggregate_type: str) -> Iterator[list[str]]:
    """Inserts about 500 single-event transactions a second meanwhile; the ids in commit order."""
    ids: list[str] = []
    stopping = threading.Event()

    def write() -> None:
        while not stopping.wait(0.002):
            ids.append(world.insert(aggregate_type, f"a-{len(ids) % 20}"))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield ids
    finally:
        stopping.set()
        thread.join()


def wait_for_load(world: World, ids: list[str]) -> None:
    """Until the relay has caught up and goes on for a while."""
    world.wait_until_confirmed()
    enough = len(ids) + 200
    wait_until(lambda: len(ids) > enough, "load")


def delivered_ids(world: World, aggregate_type: str, count: int) -> list[str]:
    messages = world.read(aggregate_type, count)
    return [str(dict(headers_of(message))["id"]) for message in messages]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_clean_stop_under_load_resends_nothing(world: World, start_relay: StartRelay, number: signal.Signals) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    with load(world, aggregate_type) as ids:
        for _ in range(3):
            relay = start_relay()
            wait_for_load(world, ids)
            relay.process.send_signal(number)
            assert relay.process.wait(20) == 0
    relay = start_relay()
    world.wait_until_confirmed()
    assert sorted(delivered_ids(world, aggregate_type, len(ids))) == sorted(ids)


def test_a_killed_relay_loses_nothing(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    with load(world, aggregate_type) as ids:
        for _ in range(3):
            relay = start_relay()
            wait_for_load(world, ids)
            relay.process.kill()
            relay.process.wait()
    start_relay()
    world.wait_until_confirmed()
    delivered = delivered_ids(world, aggregate_type, len(ids))
    assert set(delivered) == set(ids)
    assert len(delivered) - len(ids) <= 3 * 50, "only what was in flight is sent again"


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


def test_a_standby_ends_at_once(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    start_relay()
    standby = start_relay(wait=False)
    wait_until(lambda: readyz_state(standby) == "standby", "the second stands by")
    standby.process.send_signal(signal.SIGTERM)
    assert standby.process.wait(5) == 0


def readyz_state(relay: RelayProcess) -> object:
    try:
        return readyz(relay)["state"]
    except OSError:
        return None


def test_a_taken_http_port_is_said_and_taken_over(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    leader = start_relay()
    standby = start_relay(wait=False, CDC_OUTBOX_HTTP__LISTEN=leader.address)
    standby.address = leader.address
    wait_until(lambda: "http_address_in_use" in standby.said(), "it says so")
    leader.process.send_signal(signal.SIGTERM)
    assert leader.process.wait(20) == 0
    wait_until(lambda: readyz_state(standby) == "streaming", "slot and port are taken over")


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
        ("DROP PUBLICATION cdc_outbox", "publication 'cdc_outbox' does not exist"),
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
    wait_until(lambda: relay.metric("cdc_outbox_slot_lag_bytes") is not None, "the monitor has looked")


def test_logs_for_machines(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    relay = start_relay(CDC_OUTBOX_LOG_FORMAT="json")
    relay.process.send_signal(signal.SIGTERM)
    assert relay.process.wait(20) == 0
    events = [json.loads(line)["event"] for line in relay.said().splitlines()]
    assert {"http_listening", "streaming", "stopped"} == set(events)


@pytest.fixture(scope="module")
def jars() -> list[Path]:
    return fetch_kafka()


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
            gone = time.monotonic()
            ids += [world.insert("t", f"a-{number}") for number in range(500)]
            wait_until(lambda: readyz(relay)["state"] == "waiting", "not ready", timeout_seconds=10)
            assert "broker" in str(readyz(relay)["reason"]) or "Kafka" in str(readyz(relay)["reason"])
            assert relay.process.poll() is None

            relay.process.send_signal(signal.SIGTERM)
            asked = time.monotonic()
            assert relay.process.wait(10) == 0
            assert time.monotonic() - asked < 6
            assert "shutdown_deadline_passed" in relay.said()
            assert "unacknowledged_events=500" in relay.said()

            relay = start_relay(wait=False, **settings)
            wait_until(lambda: readyz_state(relay) == "waiting", "the next one waits for the broker")
            assert time.monotonic() > gone
            kafka.start()
            world.wait_until_confirmed()
            wait_until(lambda: readyz_state(relay) == "streaming", "ready again", timeout_seconds=10)
            messages = read_topic(kafka.bootstrap_servers, "outbox.t", len(ids))
            delivered = {dict(headers_of(message))["id"] for message in messages}
            assert delivered == set(ids)


def test_postgresql_stops_fast_while_the_broker_is_down(tmp_path: Path, jars: list[Path]) -> None:
    """It waits for a walsender whose events are not confirmed, unless the relay lets go."""
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
            with RelayProcess(settings, tmp_path / "relay.log") as relay:
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


SECRET = "hunter2-secret"


def bad(world: World) -> dict[str, tuple[dict[str, str], int, str]]:
    """What is wrong: settings, exit code, what the error names."""
    wrong_password = conninfo.make_conninfo(world.dsn, password=SECRET)
    return {
        "no dsn": ({"CDC_OUTBOX_POSTGRES__DSN": f"nonsense {SECRET}"}, 2, "postgres.dsn"),
        "password": ({"CDC_OUTBOX_POSTGRES__DSN": wrong_password}, 3, "password authentication failed for user"),
        "database": ({"CDC_OUTBOX_POSTGRES__DSN": conninfo.make_conninfo(world.dsn, dbname="nope")}, 3, '"nope"'),
        "slot": ({"CDC_OUTBOX_POSTGRES__SLOT": "nope"}, 3, "slot 'nope' does not exist -- run: cdc-outbox migrate up"),
        "slot name": ({"CDC_OUTBOX_POSTGRES__SLOT": "No-Slot"}, 2, "postgres.slot = 'No-Slot'"),
        "publication": ({"CDC_OUTBOX_POSTGRES__PUBLICATION": "nope"}, 3, "publication 'nope' does not exist"),
        "table": ({"CDC_OUTBOX_OUTBOX__TABLE": "app.nope"}, 3, "table app.nope does not exist"),
        "column": ({"CDC_OUTBOX_OUTBOX__COLUMNS__PAYLOAD": "nope"}, 3, "no column 'nope', wanted for payload"),
        "topic": ({"CDC_OUTBOX_KAFKA__TOPIC": "nope"}, 3, "topic nope does not exist"),
        "template": ({"CDC_OUTBOX_KAFKA__TOPIC": "a{"}, 2, "kafka.topic = 'a{'"),
        "promise": ({"CDC_OUTBOX_KAFKA__PRODUCER__ACKS": "1"}, 2, "kafka.producer.acks cannot be set"),
        "key": ({"CDC_OUTBOX_KAFKA__NOPE": "1"}, 2, "unknown key kafka.nope"),
        "value": ({"CDC_OUTBOX_KAFKA__HEADERS": "nope"}, 2, "kafka.headers = 'nope'"),
        "no broker": ({"CDC_OUTBOX_KAFKA__BOOTSTRAP_SERVERS": ""}, 2, "kafka.bootstrap_servers is required"),
        "listen": ({"CDC_OUTBOX_HTTP__LISTEN": "192.0.2.1:80"}, 2, "http.listen = 192.0.2.1:80"),
    }


def test_what_is_wrong_is_said_in_one_line_with_its_exit_code(world: World) -> None:
    world.migrate()
    for name, (settings, exit_code, named) in bad(world).items():
        done = command.run({**world.environment, **settings}, "run")
        assert done.exit_code == exit_code, (name, done)
        assert named in done.error, name
        assert " -- " in done.error or exit_code == 2, f"{name}: how to mend it"
        everything = done.out + done.err
        assert "Traceback" not in everything
        assert SECRET not in everything


def test_a_topic_missing_for_a_row_stops_before_it_and_loses_nothing(world: World) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    good = world.insert(aggregate_type)
    missing = f"{world.name}_missing"
    world.insert(missing)
    done = command.run(world.environment, "run")
    assert done.exit_code == 3
    assert f"topic outbox.{missing} does not exist" in done.error
    assert "kafka.create_topics" in done.error
    # mended, it goes on where it stopped
    with RelayProcess({**without_http(world), "CDC_OUTBOX_KAFKA__CREATE_TOPICS": "true"}, Path("/dev/null")) as relay:
        relay.wait_until_ready()
        world.wait_until_confirmed()
    assert good in delivered_ids(world, aggregate_type, 1)
    assert len(read_topic(world.bootstrap_servers, f"outbox.{missing}", 1)) == 1


def without_http(world: World) -> dict[str, str]:
    return {key: value for key, value in world.environment.items() if key != "CDC_OUTBOX_HTTP__LISTEN"}


def test_poison_stops_the_relay_before_anything_passes_it(world: World) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    good = world.insert(aggregate_type)
    before = world.current_lsn()
    world.insert("no topic", payload='{"secret": "payload"}')
    world.insert(aggregate_type)
    for _ in range(2):
        done = command.run(world.environment, "run")
        assert done.exit_code == 3
        assert "topic 'outbox.no topic' does not match" in done.error
        assert "(event 1 of the transaction that commits at " in done.error
        assert "secret" not in done.err
        assert world.confirmed_lsn() == before, "what came before is confirmed, and sent once"
    assert delivered_ids(world, aggregate_type, 1) == [good]


def test_an_event_too_large_for_the_topic_stops_the_relay_and_nothing_passes_it(world: World) -> None:
    world.migrate()
    topic = f"outbox.{world.name}_small"
    create_topic(world.bootstrap_servers, topic, partitions=1, **{"max.message.bytes": "3000"})
    incompressible = json.dumps({"x": "".join(str(uuid.uuid4()) for _ in range(300))})
    with world.db.transaction():
        world.insert(f"{world.name}_small", payload=incompressible)
        world.insert(f"{world.name}_small")
    done = command.run(world.environment, "run")
    assert done.exit_code == 3
    assert f"can never be published to topic {topic}: MSG_SIZE_TOO_LARGE" in done.error
    assert "max.message.bytes" in done.error
    assert read_topic(world.bootstrap_servers, topic, 0) == []


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [("MESSAGE_MAX_BYTES", "2000", "MSG_SIZE_TOO_LARGE"), ("QUEUE_BUFFERING_MAX_KBYTES", "2", "max.kbytes")],
)
def test_an_event_too_large_for_the_client_stops_the_relay(world: World, key: str, value: str, named: str) -> None:
    world.migrate()
    world.insert(world.create_topic(), payload=json.dumps({"x": "x" * 4000}))
    done = command.run({**world.environment, f"CDC_OUTBOX_KAFKA__PRODUCER__{key}": value}, "run")
    assert done.exit_code == 3
    assert named in done.error


def test_a_server_that_is_not_there_is_waited_for(world: World, start_relay: StartRelay) -> None:
    dsn = f"host=127.0.0.1 port={free_port()} user=u password={SECRET}"
    relay = start_relay(wait=False, CDC_OUTBOX_POSTGRES__DSN=dsn)
    wait_until(lambda: readyz_state(relay) == "waiting", "not ready", timeout_seconds=10)
    assert "cannot be reached" in str(readyz(relay)["reason"])
    relay.process.send_signal(signal.SIGTERM)
    assert relay.process.wait(10) == 0
    assert SECRET not in relay.said()
