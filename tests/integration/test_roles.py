"""The roles of sql/0004_roles.sql: what the relay's may do, and what nobody gave it."""

import psycopg
import pytest
from psycopg import conninfo

from support import command
from support.world import World

_READABLE = """
    SELECT format('%%s.%%s', nspname, relname)
      FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
     WHERE relkind IN ('r', 'p', 'v', 'm', 'f') AND nspname NOT IN ('pg_catalog', 'information_schema')
       AND has_schema_privilege(%(role)s, n.oid, 'USAGE') AND has_any_column_privilege(%(role)s, c.oid, 'SELECT')
     ORDER BY 1
"""


def readable(world: World, role: str) -> list[str]:
    return [name for (name,) in world.db.execute(_READABLE, {"role": role}).fetchall()]


def test_the_relay_s_role_streams_the_outbox_and_can_read_no_table_but_its_own(every_world: World) -> None:
    world = every_world
    world.db.execute("CREATE TABLE salaries (who text, how_much int)")
    world.migrate()
    own = [
        f"cdc_outbox.{name}"
        for name in ("canary", "confirmation", "coverage", "dead_letter", "redrive_outcome", "settled")
    ]
    assert readable(world, "cdc_outbox_relay") == own
    world.db.execute("ALTER ROLE cdc_outbox_relay PASSWORD 'pw'")
    dsn = conninfo.make_conninfo(world.dsn, user="cdc_outbox_relay", password="pw")
    with psycopg.connect(dsn, autocommit=True) as session:
        for table in ("outbox", "salaries", "cdc_outbox.schema_migration", "cdc_outbox.event_status"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                session.execute(f"SELECT FROM {table}")
    with psycopg.connect(conninfo.make_conninfo(dsn, replication="database")) as stream:
        row = stream.pgconn.exec_(b"IDENTIFY_SYSTEM")
        assert row.ntuples == 1
    status = command.run({**world.environment, "CDC_OUTBOX_POSTGRES__DSN": dsn}, "status")
    assert status.exit_code == 0, status.err


def test_the_reader_s_role_sees_everything_but_the_events(every_world: World) -> None:
    world = every_world
    world.migrate()
    seen = readable(world, "cdc_outbox_reader")
    assert "cdc_outbox.event_status" in seen
    assert "cdc_outbox.dead_letter" in seen
    assert not [name for name in seen if not name.startswith("cdc_outbox.")]
    (payload,) = world.db.execute(
        "SELECT has_column_privilege('cdc_outbox_reader', 'cdc_outbox.dead_letter', 'payload', 'SELECT')"
    ).fetchall()
    assert payload == (False,)
