"""The roles of sql/roles.sql: what the relay's may do, and what nobody gave it."""

from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from cdc_outbox.operations.migrations import load_migrations
from support import command
from support.world import World

SQL = Path(__file__).parents[2] / "sql"

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
    names = ("canary", "confirmation", "coverage", "outcome", "parked", "policy", "settled")
    own = [f"cdc_outbox.{name}" for name in names]
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
    assert "cdc_outbox.parked" in seen
    assert [name for name in seen if not name.startswith("cdc_outbox.")] == ["public.outbox"]
    with psycopg.connect(world.dsn) as session:
        session.execute("SET ROLE cdc_outbox_reader")
        assert session.execute("SELECT count(*) FROM cdc_outbox.event_status").fetchone() == (0,)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.execute("SELECT payload FROM outbox")
    (payload,) = world.db.execute(
        "SELECT has_column_privilege('cdc_outbox_reader', 'cdc_outbox.parked', 'payload', 'SELECT')"
    ).fetchall()
    assert payload == (False,)


def rights(world: World, role: str) -> list[tuple[str, ...]]:
    """All that ``role`` may do to the relay's tables, by trying: table, column and right."""
    return world.db.execute(
        """
        SELECT relname, attname, held
          FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid AND attnum > 0 AND NOT attisdropped,
               unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) AS held
         WHERE relnamespace IN ('cdc_outbox'::regnamespace, 'public'::regnamespace) AND relkind IN ('r', 'v', 'S')
           AND has_column_privilege(%(role)s, pg_class.oid, attname, held)
         UNION ALL
        SELECT relname, NULL, held FROM pg_class, unnest(ARRAY['DELETE', 'TRUNCATE', 'TRIGGER']) AS held
         WHERE relnamespace = 'cdc_outbox'::regnamespace AND relkind IN ('r', 'v')
           AND has_table_privilege(%(role)s, pg_class.oid, held)
         ORDER BY 1, 2, 3
        """,
        {"role": role},
    ).fetchall()


#: What somebody, or an earlier version of these files, may have left.
_BEFORE = (
    "GRANT ALL ON ALL TABLES IN SCHEMA cdc_outbox TO cdc_outbox_reader, cdc_outbox_relay",
    "GRANT SELECT (payload, key), UPDATE (note) ON cdc_outbox.parked TO cdc_outbox_reader",
    "GRANT CREATE ON SCHEMA cdc_outbox TO cdc_outbox_relay",
    "GRANT SELECT ON outbox TO cdc_outbox_reader",
    "GRANT SELECT (payload) ON outbox TO cdc_outbox_reader",
    "ALTER DEFAULT PRIVILEGES IN SCHEMA cdc_outbox GRANT SELECT ON TABLES TO cdc_outbox_reader",
    "REVOKE ALL ON ALL TABLES IN SCHEMA cdc_outbox FROM cdc_outbox_reader, cdc_outbox_relay",
)


def test_rights_are_the_same_whatever_was_before(every_world: World) -> None:
    world = every_world
    world.migrate()
    roles = ("cdc_outbox_relay", "cdc_outbox_reader")
    before = {role: rights(world, role) for role in roles}
    for files in (["roles.sql"], [migration.name for migration in load_migrations()] + ["roles.sql"]):
        for mess in _BEFORE:
            world.db.execute(mess.encode())
            for file in files:
                world.db.execute((SQL / file).read_bytes())
            assert {role: rights(world, role) for role in roles} == before, mess
            world.db.execute("CREATE TABLE cdc_outbox.later (x int)")
            assert [name for role in roles for name, *_ in rights(world, role) if name == "later"] == []
            world.db.execute("DROP TABLE cdc_outbox.later")
    assert command.run(world.environment, "migrate", "up").out == "nothing to do\n"
    assert ("parked", "payload", "SELECT") not in before["cdc_outbox_reader"]
    assert {held for _, _, held in before["cdc_outbox_reader"]} == {"SELECT"}


def test_of_an_outbox_that_is_no_longer_entered_nothing_is_left_to_read(every_world: World) -> None:
    world = every_world
    world.migrate()
    world.db.execute("CREATE TABLE mine (x int); GRANT SELECT ON mine TO cdc_outbox_reader")
    assert readable(world, "cdc_outbox_reader")[-2:] == ["public.mine", "public.outbox"]
    world.db.execute("DELETE FROM cdc_outbox.outbox")
    world.db.execute((SQL / "roles.sql").read_bytes())
    assert readable(world, "cdc_outbox_reader")[-1] == "public.mine", "which somebody else has granted"


def test_a_role_that_was_made_later_gets_its_rights(world: World) -> None:
    world.migrate()
    wanted = rights(world, "cdc_outbox_reader")
    world.db.execute("REVOKE ALL ON ALL TABLES IN SCHEMA cdc_outbox FROM cdc_outbox_reader")
    assert command.run(world.environment, "migrate", "up").out == "set the rights of the roles\n"
    assert rights(world, "cdc_outbox_reader") == wanted


def test_roles_that_cannot_be_made_are_said(world: World) -> None:
    """By an administrator who owns the database and may make no roles."""
    world.migrate()
    owner = f"{world.name}_owner"
    script = (SQL / "roles.sql").read_text().replace("cdc_outbox_r", f"{world.name}_r")
    world.db.execute(f"CREATE ROLE {owner}; ALTER SCHEMA cdc_outbox OWNER TO {owner}")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):  # what it does not own it cannot give
        world.db.execute(f"SET ROLE {owner}; {script}")
    world.db.execute("RESET ROLE")
    tables = "SELECT oid::regclass::text FROM pg_class WHERE relnamespace = 'cdc_outbox'::regnamespace"
    for (table,) in world.db.execute(f"{tables} AND relkind IN ('r', 'v')").fetchall():
        world.db.execute(f"ALTER TABLE {table} OWNER TO {owner}")
    notices: list[str] = []
    world.db.add_notice_handler(lambda notice: notices.append(f"{notice.message_primary} {notice.message_hint}"))
    try:
        world.db.execute(f"SET ROLE {owner}; {script}")
        assert "roles of cdc-outbox were not created" in notices[0]
        assert "sql/roles.sql" in notices[0]
    finally:
        world.db.execute(f"RESET ROLE; REASSIGN OWNED BY {owner} TO current_user; DROP ROLE {owner}")
