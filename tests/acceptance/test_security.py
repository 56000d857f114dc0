"""TLS towards PostgreSQL, as the relay meets it; that towards Kafka lies with the fault suite's broker (test_kafka)."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from acceptance.conftest import StartRelay
from cdc_outbox.demo.postgres import EmbeddedPostgres
from cdc_outbox.demo.stack import running, server_folder
from support import command
from support.services import OTHER_POSTGRES, debian_programs
from support.tls import Certificates, make_certificates, tls_in_front_of
from support.world import World, headers_of, make_world


@pytest.fixture(params=["proxy", *filter(debian_programs, OTHER_POSTGRES)])
def world(request: pytest.FixtureRequest, kafka: str) -> Iterator[World]:
    """Its DSN verifies the server's certificate. By a proxy before the server at hand, which was built without TLS,
    and on every server of Debian's here, which has it.
    """
    with ExitStack() as stack:
        certificates = make_certificates(stack.enter_context(server_folder()))
        if request.param == "proxy":
            world = stack.enter_context(make_world(request.getfixturevalue("postgres"), kafka))
            server_port = int(world.db.info.port)
            port = stack.enter_context(tls_in_front_of(server_port, certificates))
            world.dsn = conninfo.make_conninfo(world.dsn, host="127.0.0.1", port=port)
        else:
            server = make_tls_server(stack, request.param, certificates)
            stack.enter_context(running(server))
            world = stack.enter_context(make_world(server.dsn(), kafka))
        world.dsn = conninfo.make_conninfo(world.dsn, sslmode="verify-full", sslrootcert=str(certificates.ca))
        yield world


def make_tls_server(stack: ExitStack, version: str, certificates: Certificates) -> EmbeddedPostgres:
    certificates.key.chmod(0o600)
    if os.geteuid() == 0:
        shutil.chown(certificates.key, "nobody")  # whom the server runs as then
    folder = stack.enter_context(server_folder())
    settings = {"ssl": "on", "ssl_cert_file": str(certificates.certificate), "ssl_key_file": str(certificates.key)}
    return EmbeddedPostgres(folder / "postgres", bin_folder=debian_programs(version), settings=settings)


def test_events_flow_over_verified_tls(world: World, start_relay: StartRelay) -> None:
    """Large ones too: what libpq had decrypted already would wake nobody."""
    world.migrate()
    aggregate_type = world.create_topic()
    start_relay()
    with psycopg.connect(world.dsn) as session:
        assert session.pgconn.ssl_in_use
        session.execute(
            "INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload)"
            " SELECT %s, n, 't', to_json(repeat('x', 20000)) FROM generate_series(1, 500) AS n",
            [aggregate_type],
        )
    assert len(world.read(aggregate_type, 500)) == 500
    last = world.insert(aggregate_type)
    assert last in {dict(headers_of(message))["id"] for message in world.read(aggregate_type, 501)}


def test_a_server_of_another_ca_is_refused(world: World, start_relay: StartRelay, tmp_path: Path) -> None:
    dsn = conninfo.make_conninfo(world.dsn, sslrootcert=str(make_certificates(tmp_path).ca))
    relay = start_relay(wait=False, CDC_OUTBOX_POSTGRES__DSN=dsn)
    assert relay.process.wait(20) == 3  # at once: nothing is tried again
    assert "certificate verify failed" in relay.said()
    assert "sslrootcert" in relay.said()


def test_a_server_of_another_name_is_refused(world: World) -> None:
    dsn = conninfo.make_conninfo(world.dsn, host="localhost")
    done = command.run({**world.environment, "CDC_OUTBOX_POSTGRES__DSN": dsn}, "status")
    assert done.exit_code == 3
    assert "does not match host name" in done.error
