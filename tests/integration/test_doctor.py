"""The doctor's checks, each made to say no for real."""

import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

import psycopg
import pytest
from psycopg import conninfo

from cdc_outbox.config import Config
from cdc_outbox.demo.postgres import EmbeddedPostgres
from cdc_outbox.demo.stack import running, server_folder
from cdc_outbox.operations.doctor import run_checks
from cdc_outbox.operations.findings import Finding
from cdc_outbox.operations.postgres_checks import clock_finding
from cdc_outbox.postgres.connection import connect
from support.waiting import wait_until
from support.world import World, create_topic, make_world, read_topic


def doctor(world: World, *, dsn: str = "", outbox: Any = None, **kafka: Any) -> list[Finding]:
    config = Config(
        postgres={"dsn": dsn or world.dsn, "slot": world.slot},
        kafka={
            "bootstrap_servers": world.bootstrap_servers,
            "topic": f"outbox.{world.name}" + "{aggregate_type}",
            **kafka,
        },
        outbox=outbox or {},
        canary={"topic": canary_topic(world)},
    )
    return list(run_checks(config))


def canary_topic(world: World) -> str:
    return f"{world.name}-canary"


def said(findings: list[Finding], state: str, *words: str) -> Finding:
    """The one finding of this state with all these words in it."""
    matching = [
        finding
        for finding in findings
        if finding.state == state and all(word in f"{finding.check} {finding.found} {finding.hint}" for word in words)
    ]
    assert len(matching) == 1, findings
    assert state == "ok" or matching[0].hint
    return matching[0]


@contextmanager
def setting(world: World, name: str, value: str) -> Iterator[None]:
    """For the whole server, as long as this lasts."""

    def alter(statement: str) -> None:
        world.db.execute(statement.encode())
        world.db.execute("SELECT pg_reload_conf()")

    def has(expected: str) -> bool:
        with psycopg.connect(world.dsn) as connection:
            return connection.execute("SELECT current_setting(%s)", [name]).fetchone() == (expected,)

    alter(f"ALTER SYSTEM SET {name} = '{value}'")
    try:
        wait_until(lambda: has(value), f"{name} is {value}")
        yield
    finally:
        alter(f"ALTER SYSTEM RESET {name}")
        wait_until(lambda: not has(value), f"{name} is no more {value}")


@contextmanager
def role(world: World, attributes: str, *grants: str) -> Iterator[str]:
    """A DSN of a role of its own."""
    name = f"{world.name}_role"
    world.db.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'secret' {attributes}".encode())
    for grant in grants:
        world.db.execute(f"GRANT {grant} TO {name}".encode())
    try:
        yield conninfo.make_conninfo(world.dsn, user=name, password="secret")
    finally:
        world.db.execute(f"DROP OWNED BY {name}; DROP ROLE {name}".encode())


_STATE = (
    "USAGE ON SCHEMA cdc_outbox",
    "SELECT, INSERT, UPDATE ON cdc_outbox.parked",
    "SELECT, INSERT ON cdc_outbox.outcome",
    "SELECT, INSERT ON cdc_outbox.policy",
    "SELECT, INSERT, UPDATE ON cdc_outbox.confirmation",
    "SELECT, INSERT, DELETE ON cdc_outbox.settled, cdc_outbox.coverage",
    "SELECT, INSERT, DELETE ON cdc_outbox.canary",
)


def test_all_is_well(every_world: World) -> None:
    world = every_world
    world.migrate()
    create_topic(world.bootstrap_servers, f"outbox.{world.name}a", partitions=6, **{"min.insync.replicas": "2"})
    create_topic(world.bootstrap_servers, canary_topic(world))
    with role(world, "REPLICATION", *_STATE) as dsn, setting(world, "max_slot_wal_keep_size", "10GB"):
        findings = doctor(world, dsn=dsn)
    assert [finding for finding in findings if finding.state != "ok"] == []
    assert {finding.check for finding in findings} >= {"server", "slot", "publication", "role", "broker", "clocks"}
    assert findings[-1].check == "round trip"
    (record,) = read_topic(world.bootstrap_servers, canary_topic(world), 1)
    assert record.value() == b"{}"


def test_a_round_trip_that_cannot_be_tried(world: World) -> None:
    said(doctor(world), "warning", "round trip not tried", "fix what failed")
    world.migrate()
    world.settings["CDC_OUTBOX_CANARY__TOPIC"] = f"{world.name}.canary"
    said(doctor(world), "ok", "round trip", canary_topic(world))
    assert world.db.execute("SELECT count(*) FROM cdc_outbox.canary").fetchone() == (0,)


def test_a_canary_that_does_not_arrive(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdc_outbox.operations.round_trip._PATIENCE_SECONDS", 1.0)
    world.migrate()
    create_topic(world.bootstrap_servers, canary_topic(world))
    said(doctor(world), "ok", "round trip")
    event_id = world.insert("t")  # nobody's events are sent
    world.db.execute("ALTER PUBLICATION cdc_outbox DROP TABLE cdc_outbox.canary")
    said(doctor(world), "failed", "round trip", "did not arrive", "cdc-outbox migrate up")
    assert event_id
    world.migrate()
    said(doctor(world), "ok", "round trip")


def test_a_round_trip_behind_a_transaction_that_does_not_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdc_outbox.operations.round_trip._SLOT_SECONDS", 1)
    world.migrate()
    create_topic(world.bootstrap_servers, canary_topic(world))
    with psycopg.connect(world.dsn) as long_running:
        long_running.execute("SELECT pg_current_xact_id()")
        said(doctor(world), "failed", "round trip", "lock timeout", "long transactions")


def test_unlimited_wal(world: World) -> None:
    said(doctor(world), "warning", "max_slot_wal_keep_size is unlimited", "ALTER SYSTEM SET max_slot_wal_keep_size")


def test_idle_slots_that_time_out(world: World) -> None:
    if world.db.info.server_version < 180000:
        assert not any(finding.check == "idle slots" for finding in doctor(world))
        return
    with setting(world, "idle_replication_slot_timeout", "10min"):
        said(doctor(world), "warning", "idle slots", "600 s", "ALTER SYSTEM SET idle_replication_slot_timeout = 0")


def test_no_slot_is_free(world: World) -> None:
    ((most,),) = world.db.execute("SELECT current_setting('max_replication_slots')::int").fetchall()
    made: list[str] = []
    try:
        for number in range(most):
            name = f"{world.name}_{number}"
            try:
                world.db.execute("SELECT pg_create_physical_replication_slot(%s)", [name])
            except psycopg.errors.ConfigurationLimitExceeded:
                break
            made.append(name)
        said(doctor(world), "failed", "free slots", "is not among them", f"max_replication_slots = {most + 4}")
    finally:
        for name in made:
            world.db.execute("SELECT pg_drop_replication_slot(%s)", [name])


def test_no_walsender_is_free(world: World) -> None:
    with ExitStack() as stack:
        for _ in range(100):
            try:
                stack.enter_context(connect(world.dsn, replication="database"))
            except Exception:  # noqa: BLE001 - now they are all taken
                break
        findings = doctor(world)
        said(findings, "failed", "free walsenders", "ALTER SYSTEM SET max_wal_senders")
        said(findings, "failed", "replication connection", "max_wal_senders")


def test_a_server_that_writes_no_logical_wal(kafka: str) -> None:
    with server_folder() as folder:
        server = EmbeddedPostgres(folder / "postgres", settings={"wal_level": "replica"})
        with running(server), make_world(server.dsn(), kafka) as world:
            said(doctor(world), "failed", "wal_level is replica", "ALTER SYSTEM SET wal_level = 'logical'")


def test_a_slot_that_is_about_to_be_lost(kafka: str) -> None:
    with server_folder() as folder:
        settings = {"max_slot_wal_keep_size": "1MB", "max_wal_size": "1GB", "checkpoint_timeout": "1h"}
        server = EmbeddedPostgres(folder / "postgres", settings=settings)
        with running(server), make_world(server.dsn(), kafka) as world:
            world.migrate()
            for _ in range(6):
                world.db.execute("SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000)), pg_switch_wal()")
            said(doctor(world), "failed", "is unreserved", "start the relay now")
            world.db.execute("CHECKPOINT")
            said(doctor(world), "failed", "is lost", "had not sent is then in the table only")


def test_there_is_nothing(world: World) -> None:
    findings = doctor(world)
    said(findings, "failed", "table public.outbox does not exist", "cdc-outbox migrate up")
    said(findings, "failed", f"slot '{world.slot}' does not exist", "cdc-outbox migrate up")


def test_the_table_does_not_fit(world: World) -> None:
    world.migrate()
    said(doctor(world, outbox={"columns": {"payload": "created_at"}}), "failed", "cannot be a payload")
    said(doctor(world, outbox={"columns": {"aggregate_id": "nope"}}), "failed", "no column 'nope'")


def test_the_publication(world: World) -> None:
    world.migrate()
    world.db.execute("ALTER PUBLICATION cdc_outbox SET (publish = 'insert, update')")
    findings = doctor(world)
    said(
        findings, "warning", "publishes more than inserts", "ALTER PUBLICATION \"cdc_outbox\" SET (publish = 'insert')"
    )
    said(findings, "warning", "was changed after what slot", "let the relay catch up")
    world.db.execute("ALTER PUBLICATION cdc_outbox DROP TABLE outbox")
    said(doctor(world), "failed", "does not list table public.outbox", "ADD TABLE")
    world.db.execute("DROP PUBLICATION cdc_outbox")
    said(doctor(world), "failed", "publication 'cdc_outbox' does not exist")


def test_rows_of_which_it_cannot_be_told(world: World) -> None:
    world.migrate()
    assert not [finding for finding in doctor(world) if finding.check == "updates"]
    world.db.execute("DELETE FROM cdc_outbox.coverage")
    said(doctor(world), "warning", "of rows of outbox it cannot always be told", "do not update public.outbox")


def test_a_partitioned_outbox_without_its_root(world: World) -> None:
    world.db.execute(
        "CREATE TABLE events (id uuid, aggregate_type text, aggregate_id text, event_type text, payload json)"
        " PARTITION BY LIST (event_type); CREATE TABLE events_rest PARTITION OF events DEFAULT"
    )
    world.migrate(table="public.events")
    world.db.execute("ALTER PUBLICATION cdc_outbox SET (publish_via_partition_root = false)")
    said(doctor(world, outbox={"table": "events"}), "failed", "publish_via_partition_root = true")


def test_a_slot_of_another_kind(world: World) -> None:
    world.migrate()
    world.db.execute("SELECT pg_drop_replication_slot(%s)", [world.slot])
    world.db.execute("SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", [world.slot])
    said(doctor(world), "failed", "uses test_decoding, not pgoutput")


def test_who_holds_the_slot(world: World) -> None:
    world.migrate()
    said(doctor(world), "ok", "slot", "held by nobody")
    with closing(connect(world.dsn, replication="database", application_name="somebody")) as stream:
        stream.pgconn.exec_(
            (
                f"START_REPLICATION SLOT {world.slot} LOGICAL 0/0 (proto_version '1', publication_names 'cdc_outbox')"
            ).encode()
        )
        said(doctor(world), "ok", "slot", "held by somebody from 127.0.0.1")


def test_a_slot_that_does_not_fail_over(world: World) -> None:
    world.migrate()
    with closing(psycopg.connect(world.dsn, replication="true", autocommit=True)) as standby:
        standby.pgconn.exec_(f"START_REPLICATION PHYSICAL {world.current_lsn()}".encode())
        state = "SELECT state FROM pg_stat_replication WHERE pid = %s"
        pid = standby.pgconn.backend_pid
        wait_until(lambda: world.db.execute(state, [pid]).fetchone() == ("streaming",), "a standby streams")
        findings = doctor(world)
    if world.db.info.server_version >= 170000:
        said(findings, "warning", "does not go with a failover", f"ALTER_REPLICATION_SLOT {world.slot} (FAILOVER true)")
    assert not any(finding.check == "slot's failover" for finding in doctor(world)), "without a standby it is no matter"


def test_a_superuser(world: World) -> None:
    world.migrate()
    said(doctor(world), "warning", "is a superuser", "cdc_outbox_relay")


def test_a_role_with_too_much(world: World) -> None:
    world.migrate()
    with role(world, "REPLICATION CREATEDB CREATEROLE", *_STATE, "SELECT ON outbox") as dsn:
        findings = doctor(world, dsn=dsn)
    said(findings, "warning", "has CREATEROLE, CREATEDB", "NOCREATEROLE NOCREATEDB")
    said(findings, "warning", "may SELECT from public.outbox", 'REVOKE SELECT ON "public"."outbox"')


def test_a_role_with_too_little(world: World) -> None:
    world.migrate()
    with role(world, "NOREPLICATION", "USAGE ON SCHEMA cdc_outbox") as dsn:
        findings = doctor(world, dsn=dsn)
    said(findings, "warning", "has not REPLICATION", "ALTER ROLE")
    said(findings, "failed", "replication connection", "ALTER ROLE ... REPLICATION")
    said(findings, "failed", "cannot keep the relay's state", "GRANT SELECT, INSERT, UPDATE ON cdc_outbox.parked")


def test_no_schema(world: World) -> None:
    world.migrate()
    world.db.execute("DROP SCHEMA cdc_outbox CASCADE")
    with role(world, "REPLICATION") as dsn:
        said(doctor(world, dsn=dsn), "failed", "cdc_outbox has no table parked", "cdc-outbox migrate up")


def test_a_pooler(world: World) -> None:
    parameters = conninfo.conninfo_to_dict(world.dsn)
    with pooler(str(parameters["host"]), int(str(parameters["port"]))) as port:
        dsn = conninfo.make_conninfo(world.dsn, port=port, sslmode="disable", gssencmode="disable")
        said(doctor(world, dsn=dsn), "failed", "pooler", "let postgres.dsn name the server itself")


@contextmanager
def pooler(host: str, port: int) -> Iterator[int]:
    """Passes on what both say, but answers with a backend's number of its own, as poolers do. Yields its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    key = re.compile(rb"(K\0\0\0[\x0c-\xff])....", re.DOTALL)

    def pump(source: socket.socket, target: socket.socket, pid: bytes | None = None) -> None:
        while data := _receive(source):
            target.sendall(key.sub(rb"\g<1>" + pid, data) if pid else data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def handle(client: socket.socket) -> None:
        with client, socket.create_connection((host, port)) as upstream:
            forth = threading.Thread(target=pump, args=[client, upstream])
            forth.start()
            pump(upstream, client, struct.pack("!I", 4711))
            forth.join()

    def serve() -> None:
        with ThreadPoolExecutor() as handlers, suppress(OSError):
            while True:
                handlers.submit(handle, listener.accept()[0])

    server = threading.Thread(target=serve)
    server.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        server.join()
        listener.close()


def _receive(source: socket.socket) -> bytes:
    try:
        return source.recv(65536)
    except OSError:
        return b""


def test_clocks_that_disagree(world: World) -> None:
    with connect(world.dsn) as connection:
        assert clock_finding(connection, time.time).state == "ok"
        for offset in (-5, 5):
            finding = clock_finding(connection, lambda by=offset: time.time() + by)
            assert finding.state == "warning"
            assert "5.0 s apart" in finding.found


def test_no_server(world: World) -> None:
    findings = doctor(world, dsn=conninfo.make_conninfo(world.dsn, port=1))
    said(findings, "failed", "connection", "PostgreSQL cannot be reached")
    assert any(finding.check == "broker" for finding in findings), "the rest is looked at all the same"


@pytest.mark.rest
def test_no_broker(world: World) -> None:
    said(doctor(world, bootstrap_servers="127.0.0.1:1"), "failed", "broker", "no broker answers at 127.0.0.1:1")


def test_no_topic(world: World) -> None:
    said(doctor(world), "warning", "none there yet", "kafka.create_topics = true")
    said(doctor(world, create_topics=True), "ok", "none there yet")


def test_topics_that_do_not_serve(world: World) -> None:
    create_topic(world.bootstrap_servers, f"outbox.{world.name}a", partitions=1, **{"max.message.bytes": "500000"})
    findings = doctor(world)
    said(findings, "warning", "one partition", "--partitions N")
    said(findings, "warning", "one broker only", "min.insync.replicas=2")
    said(findings, "failed", "message.max.bytes", "takes less than the 1000000 bytes", "lower kafka.producer")
    said(findings, "failed", "batch.size", "takes less than the 1000000 bytes")
    findings = doctor(world, producer={"message.max.bytes": 400_000, "batch.size": 300_000})
    assert not any(finding.state == "failed" and "takes less" in finding.found for finding in findings)
