import psycopg
import pytest
from psycopg import conninfo

from cdc_outbox.demo.ports import free_port
from cdc_outbox.errors import ConfigurationError, OperatorNeeded, SourceUnavailable
from cdc_outbox.postgres.connection import connect
from support.world import World

PASSWORD = "hunter2-secret"


@pytest.mark.parametrize("dsn", ["no dsn hunter2-secret", "postgresql://u:hunter2-secret@[/"])
def test_a_dsn_that_is_none_is_not_repeated(dsn: str) -> None:
    with pytest.raises(ConfigurationError, match=r"postgres\.dsn is not a connection string") as caught:
        connect(dsn)
    assert PASSWORD not in str(caught.value) + caught.value.hint


def test_a_server_that_is_not_there_is_waited_for() -> None:
    with pytest.raises(SourceUnavailable, match="cannot be reached"):
        connect(f"host=127.0.0.1 port={free_port()} user=u password={PASSWORD}")


def test_what_no_waiting_will_change_needs_an_operator(world: World) -> None:
    role = world.name
    world.db.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'".encode())
    try:
        good = conninfo.make_conninfo(world.dsn, user=role, password=PASSWORD)
        connect(good).close()
        refusals = {
            conninfo.make_conninfo(good, password="wrong-hunter2-secret"): "password authentication failed",
            conninfo.make_conninfo(good, dbname="nope"): 'database "nope" does not exist',
            conninfo.make_conninfo(good, sslmode="require"): "does not support SSL",
        }
        for dsn, reason in refusals.items():
            with pytest.raises(OperatorNeeded, match=reason) as caught:
                connect(dsn)
            assert caught.value.hint
            assert PASSWORD not in str(caught.value)
        with pytest.raises(OperatorNeeded, match=r"(?i)replication") as caught:
            connect(good, replication="database")
        assert "REPLICATION" in caught.value.hint
        world.db.execute(f"ALTER ROLE {role} NOLOGIN".encode())
        with pytest.raises(OperatorNeeded, match="not permitted to log in"):
            connect(good)
    finally:
        with psycopg.connect(world.admin_dsn, autocommit=True) as admin:
            admin.execute(f"DROP ROLE {role}".encode())
