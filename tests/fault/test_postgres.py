"""PostgreSQL stopped, robbed and altered while events flow."""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from psycopg import conninfo

from cdc_outbox.demo.postgres import EmbeddedPostgres
from cdc_outbox.demo.stack import running, server_folder
from cdc_outbox.operations import migrations
from cdc_outbox.postgres.connection import connect
from cdc_outbox.wal.lsn import LSN
from fault.stage import Stage, peak_rss_mb, reconnected
from support import command
from support.waiting import wait_until


def test_walsender_terminated_again_and_again(stage: Stage) -> None:
    stage.start_relay()
    stage.start_writer(seed=20)
    with stage.incident():
        for _ in range(20):
            wait_until(stage.terminate_walsender, "there is one to terminate")
    stage.close("walsender terminated, 20 times in a row")


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_server_stopped_and_started(stage: Stage, mode: str) -> None:
    """After an immediate stop the slot is where the last checkpoint saved it; the relay knows better."""
    stage.start_relay()
    stage.start_writer(seed=21)
    for _ in range(2):
        stage.wait_for_events(400)
        stage.world.db.execute("CHECKPOINT")
        stage.wait_for_events(400)
        with stage.incident():
            stage.servers.postgres.stop(mode)  # type: ignore[arg-type]
            stage.servers.postgres.start()
    stage.close(f"server stopped {mode}, started", max_duplicates=0 if mode == "fast" else 1000)


@pytest.mark.parametrize("relay", ["alive", "killed"])
def test_server_crashed_long_after_its_last_checkpoint(stage: Stage, relay: str) -> None:
    """The slot steps back to the checkpoint; what is sent again is what was in flight, or about a second's worth."""
    rate = 4000
    stage.world.db.execute("CHECKPOINT")
    running = stage.start_relay()
    stage.start_writer(seed=29, events_per_second=rate)
    stage.wait_for_events(4 * rate, timeout_seconds=60)
    with stage.incident():
        if relay == "killed":
            stage.kill(running)
        stage.servers.postgres.stop("immediate")
        stage.servers.postgres.start()
        stage.world.db = reconnected(stage.world)
        if relay == "killed":
            (noted,) = stage.world.db.execute("SELECT confirmed_lsn::text FROM cdc_outbox.confirmation").fetchone() or (
                "",
            )
            assert stage.world.confirmed_lsn() < LSN.parse(noted), "it has stepped back"
            stage.start_relay()
    most = 1000 if relay == "alive" else 2 * rate
    stage.close(f"server crashed, last checkpoint long ago, relay {relay}", max_duplicates=most)


def test_nothing_unpublished_is_pruned(stage: Stage) -> None:
    """Relay killed in mid-flight, then the server, so that the slot steps back; then everything that is known goes."""
    pruned: set[str] = set()
    writer = stage.start_writer(seed=26)
    for _ in range(3):
        with stage.incident():
            relay = stage.start_relay()
            stage.wait_for_events(600)
            stage.kill(relay)
            stage.wait_for_events(200)
            stage.servers.postgres.stop("immediate")
            stage.servers.postgres.start()
            stage.world.db = reconnected(stage.world)
            seen = {event.id for event in list(writer.ledger.committed)}
            said = command.run(stage.world.environment, "prune", "--older-than", "0s").out
            left = {str(name) for (name,) in stage.world.db.execute("SELECT id FROM outbox")}
            settled = {record.event_id for record in stage.records()} | set(stage.dead_letters())
            pruned |= seen - left
            assert pruned, said
            assert pruned <= settled
            stage.start_relay()
        stage.kill(stage.relays[0])
    stage.start_relay()
    stage.close("relay killed, server crashed, table pruned")


def test_server_stopped_fast_while_the_broker_is_away(stage: Stage) -> None:
    stage.start_relay()
    stage.start_writer(seed=22)
    stage.wait_for_events(200)
    with stage.incident():
        stage.servers.kafka_proxy.refuse()
        stage.wait_for_events(200)
        asked = time.monotonic()
        stage.servers.postgres.stop("fast")
        assert time.monotonic() - asked < 5
        stage.servers.postgres.start()
        stage.servers.kafka_proxy.restore()
    stage.close("server stopped fast while the broker is away")


def test_slot_dropped(stage: Stage) -> None:
    relay = stage.start_relay()
    drop_slot(stage)
    seconds = stage.ends_with(relay, "does not exist", "had not sent is then in the table only")
    stage.refused("slot dropped while streaming", seconds)


def drop_slot(stage: Stage) -> None:
    """Snatched from under whoever has it."""
    terminate = (
        "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots WHERE slot_name = %s AND active"
    )

    def dropped() -> bool:
        stage.world.db.execute(terminate, [stage.world.slot])
        try:
            stage.world.db.execute("SELECT pg_drop_replication_slot(%s)", [stage.world.slot])
        except Exception as error:  # noqa: BLE001 - the relay was quicker: again
            return "does not exist" in str(error)
        return True

    wait_until(dropped, "the slot is dropped")


@pytest.mark.parametrize("end", ["stopped", "killed", "streaming"])
def test_slot_created_again(stage: Stage, end: str) -> None:
    """What was committed between is not in it: that is said, whether the relay was stopped, killed or is running."""
    relay = stage.start_relay()
    stage.start_writer(seed=23)
    stage.wait_for_events(800)
    assert stage.writer
    stage.writer.stop()
    stage.world.wait_until_confirmed()
    if end == "stopped":
        assert stage.stop(relay) == 0
    elif end == "killed":
        wait_until(lambda: noted_anything(stage), "something was noted")
        stage.kill(relay)
    else:
        relay.process.send_signal(signal.SIGSTOP)  # it must not run while there is no slot: that would be said too
    drop_slot(stage)
    stage.world.insert(stage.aggregate_types[0])
    stage.world.db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [stage.world.slot])
    if end == "streaming":
        relay.process.send_signal(signal.SIGCONT)
    else:
        relay = stage.start_relay(wait=False)
    named = [f"replication slot '{stage.world.slot}'", "what was committed between is not in it", "accept the gap"]
    stage.refused(f"slot created again, relay {end}", stage.ends_with(relay, *named))


def noted_anything(stage: Stage) -> bool:
    return stage.world.db.execute("SELECT FROM cdc_outbox.confirmation WHERE decoded_transactions > 0").rowcount > 0


@pytest.fixture
def little_wal(stage: Stage) -> Iterator[None]:
    db = stage.world.db
    db.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '16MB'")
    db.execute("SELECT pg_reload_conf()")
    yield
    db.execute("ALTER SYSTEM RESET max_slot_wal_keep_size")
    db.execute("SELECT pg_reload_conf()")


def test_slot_lost(stage: Stage, little_wal: None) -> None:
    """The broker is away, WAL grows beyond what slots may keep."""
    relay = stage.start_relay()
    stage.servers.kafka_proxy.refuse()
    stage.world.insert(stage.aggregate_types[0])
    stage.world.db.execute("CREATE TABLE filler (x text)")
    stage.world.db.execute("ALTER TABLE filler ALTER x SET STORAGE PLAIN")
    status = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = %s"
    began = time.monotonic()

    def lost() -> bool:
        stage.world.db.execute("INSERT INTO filler SELECT repeat('x', 7000) FROM generate_series(1, 3000)")
        stage.world.db.execute("CHECKPOINT")
        return stage.world.db.execute(status, [stage.world.slot]).fetchone() == ("lost",)

    wait_until(lost, "the slot is lost", timeout_seconds=30)
    assert time.monotonic() - began < 30
    stage.refused("slot lost", stage.ends_with(relay, f"replication slot '{stage.world.slot}' is lost"))


@pytest.mark.parametrize("trouble", ["missing", "younger than the slot"])
def test_publication_at_the_start(stage: Stage, trouble: str) -> None:
    before = stage.world.confirmed_lsn()
    stage.world.db.execute("DROP PUBLICATION cdc_outbox")
    stage.world.insert(stage.aggregate_types[0])
    if trouble == "younger than the slot":
        stage.world.db.execute("CREATE PUBLICATION cdc_outbox FOR TABLE outbox")
    relay = stage.start_relay(wait=False)
    stage.refused(f"publication {trouble}", stage.ends_with(relay, "publication", "does not exist"))
    assert stage.world.confirmed_lsn() == before, "what was not sent is not confirmed"


def test_publication_dropped_while_streaming(stage: Stage) -> None:
    relay = stage.start_relay()
    stage.world.insert(stage.aggregate_types[0])
    stage.world.wait_until_confirmed()
    stage.world.db.execute("DROP PUBLICATION cdc_outbox")
    before = stage.world.current_lsn()
    stage.world.insert(stage.aggregate_types[0])
    seconds = stage.ends_with(relay, "publication", "does not exist")
    stage.refused("publication dropped while streaming", seconds)
    assert stage.world.confirmed_lsn() <= before, "what was not sent is not confirmed"


def test_column_added(stage: Stage) -> None:
    stage.start_relay()
    stage.start_writer(seed=24)
    for number in range(3):
        stage.wait_for_events(200)
        with stage.incident():
            stage.world.db.execute(f"ALTER TABLE outbox ADD COLUMN extra{number} int DEFAULT 7".encode())
    stage.close("column added to the outbox", max_duplicates=0)


def test_required_column_dropped(stage: Stage) -> None:
    relay = stage.start_relay()
    event_id = stage.world.insert(stage.aggregate_types[0])
    stage.world.wait_until_confirmed()
    stage.world.db.execute("ALTER TABLE outbox DROP COLUMN event_type CASCADE")
    before = stage.world.current_lsn()
    stage.world.db.execute("INSERT INTO outbox (aggregate_id) VALUES ('a')")
    seconds = stage.ends_with(relay, "rows of public.outbox come without column 'event_type'")
    stage.refused("required column dropped", seconds)
    assert stage.world.confirmed_lsn() <= before
    assert [record.event_id for record in stage.records()] == [event_id]


def test_one_transaction_of_a_million_rows(stage: Stage) -> None:
    relay = stage.start_relay()
    stage.world.db.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, event_type)"
        " SELECT %s, 'a-' || j %% 1000, 'x' FROM generate_series(1, 1000000) j",
        [stage.aggregate_types[0]],
    )
    stage.world.wait_until_confirmed(timeout_seconds=120)
    assert peak_rss_mb(relay.process.pid) < 100
    verdict = stage.close("one transaction of a million rows", max_duplicates=0)
    assert verdict.events == 1_000_000
    assert verdict.duplicates == []


@pytest.mark.parametrize("right", ["LOGIN", "REPLICATION"])
def test_role_lost_its_right(stage: Stage, right: str) -> None:
    role = f"{stage.world.name}_relay"
    stage.world.db.execute(f"CREATE ROLE {role} LOGIN REPLICATION PASSWORD 'x' IN ROLE cdc_outbox_relay".encode())
    dsn = conninfo.make_conninfo(stage.world.dsn, user=role, password="x", port=stage.servers.postgres_proxy.port)
    relay = stage.start_relay(CDC_OUTBOX_POSTGRES__DSN=dsn)
    stage.world.insert(stage.aggregate_types[0])
    stage.world.wait_until_confirmed()
    stage.world.db.execute(f"ALTER ROLE {role} NO{right}".encode())
    stage.world.db.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [role])
    seconds = stage.ends_with(relay, "PostgreSQL refuses us", f"ALTER ROLE ... {right}")
    stage.refused(f"role lost {right}", seconds)
    stage.world.db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


def test_database_restored_from_an_older_state(stage: Stage) -> None:
    """The relay goes on running; WAL ends before what it has confirmed, and what it published has never happened."""
    postgres = stage.servers.postgres
    relay = stage.start_relay()
    stage.world.insert(stage.aggregate_types[0])
    stage.world.wait_until_confirmed()
    older = postgres.data.with_name("older")
    postgres.stop("fast")
    subprocess.run(["cp", "-a", postgres.data, older], check=True)
    postgres.start()
    stage.world.db = reconnected(stage.world)
    for _ in range(20):
        stage.world.insert(stage.aggregate_types[0], payload='{"x": "%s"}' % ("x" * 100_000))
    stage.world.wait_until_confirmed()
    postgres.stop("fast")
    shutil.rmtree(postgres.data)
    older.rename(postgres.data)
    postgres.start()
    stage.world.db = reconnected(stage.world)
    seconds = stage.ends_with(relay, "it has lost what it had sent", "restored from an older state")
    stage.refused("database restored from an older state", seconds)


@pytest.mark.parametrize("relay_is", ["streaming", "started again"])
def test_database_cloned(stage: Stage, relay_is: str) -> None:
    """Another server answers at the old address, with the same database, slot and even notes in it."""
    relay = stage.start_relay()
    stage.world.insert(stage.aggregate_types[0])
    stage.world.wait_until_confirmed()
    assert stage.stop(relay) == 0 if relay_is == "started again" else True
    notes = stage.world.db.execute("SELECT * FROM cdc_outbox.confirmation").fetchall()
    with server_folder() as folder:
        clone = EmbeddedPostgres(folder / "postgres")
        with running(clone):
            with connect(clone.dsn()) as admin:
                admin.execute(f"CREATE DATABASE {stage.world.name}".encode())
            dsn = conninfo.make_conninfo(clone.dsn(), dbname=stage.world.name)
            with connect(dsn) as db:
                target = migrations.Target("public.outbox", "cdc_outbox", stage.world.slot)
                migrations.up(db, target, failover=False, report=lambda _: None)
                db.execute("DELETE FROM cdc_outbox.confirmation")
                db.cursor().executemany(
                    "INSERT INTO cdc_outbox.confirmation VALUES (%s, %s, %s, %s, %s, %s, %s)", notes
                )
            proxied = conninfo.make_conninfo(dsn, port=stage.servers.postgres_proxy.port)
            if relay_is == "streaming":
                password = conninfo.conninfo_to_dict(stage.world.dsn)["password"]
                with connect(clone.dsn()) as admin:
                    admin.execute(f"ALTER ROLE postgres PASSWORD '{password}'".encode())
            stage.servers.postgres_proxy.target = clone.port
            if relay_is == "streaming":
                stage.servers.postgres_proxy.reset()
            else:
                relay = stage.start_relay(wait=False, CDC_OUTBOX_POSTGRES__DSN=proxied)
            seconds = stage.ends_with(relay, "this is another server", "the database was restored or cloned")
    stage.refused(f"database cloned, relay {relay_is}", seconds)
