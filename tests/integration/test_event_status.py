"""View cdc_outbox.event_status: in the way of no change to the outbox, and of use to its reader."""

import re
import uuid

import pytest

from cdc_outbox.errors import OperatorNeeded
from support.migrating import as_role, target, up
from support.world import World


@pytest.mark.parametrize(
    "change",
    [
        "ALTER COLUMN event_type TYPE varchar(80)",
        "ALTER COLUMN aggregate_id TYPE bigint USING aggregate_id::bigint",
        "ALTER COLUMN id DROP DEFAULT, ALTER COLUMN id TYPE char(36)",
        "ALTER COLUMN event_type TYPE later.kind",
        "RENAME TO outbox2",
        "SET SCHEMA later",
    ],
)
def test_the_view_is_in_the_way_of_no_change_to_the_outbox(every_world: World, change: str) -> None:
    world = every_world
    up(world)
    world.db.execute("INSERT INTO outbox (aggregate_id, event_type) VALUES ('1', 'x')")
    world.db.execute("CREATE SCHEMA later; CREATE DOMAIN later.kind AS text")
    world.db.execute(f"ALTER TABLE outbox {change}".encode())
    now = {"RENAME TO outbox2": "outbox2", "SET SCHEMA later": "later.outbox"}.get(change, "outbox")
    wanted = target(world, table=now)
    assert "make view cdc_outbox.event_status" in up(world, wanted)
    query = "SELECT event_type::text, state, pg_typeof(aggregate_id) FROM cdc_outbox.event_status"
    kind = "bigint" if "bigint" in change else "text"
    assert world.db.execute(query).fetchall() == [("x", "pending", kind)]
    assert as_role(world, "cdc_outbox_reader", "SELECT count(*) FROM cdc_outbox.event_status") == [(1,)]
    assert up(world, wanted) == []
    world.db.execute(f"DROP TABLE {now}")


def test_the_view_calls_nobody_else_s_functions(every_world: World) -> None:
    """Who may CREATE in a schema of the reader's search_path has no say in what it runs."""
    world = every_world
    up(world)
    world.db.execute("INSERT INTO outbox (aggregate_id, event_type) VALUES ('1', 'x')")
    for name, arguments, result in (
        ("format", "text, uuid", "text"),
        ("pg_relation_filenode", "oid", "oid"),
        ("pg_snapshot_xmin", "pg_snapshot", "xid8"),
    ):
        world.db.execute(
            f"CREATE FUNCTION {name}({arguments}) RETURNS {result} LANGUAGE plpgsql AS 'BEGIN RAISE ''caught''; END'"
        )
    world.db.execute("SET search_path = public, pg_catalog")
    assert world.db.execute("SELECT state FROM cdc_outbox.event_status").fetchall() == [("pending",)]
    (text,) = world.db.execute("SELECT prosrc FROM pg_proc WHERE proname = 'event_status_rows'").fetchone() or ("",)
    called = set(re.findall(r"(?<![\w.])(\w+)\(", re.sub(r"--.*", "", text)))
    assert called <= {"coalesce", "greatest"}, "of these nobody can make another"


def test_making_the_view_again_leaves_what_others_made_of_it(every_world: World) -> None:
    world = every_world
    up(world)
    world.db.execute("CREATE VIEW mine AS SELECT * FROM cdc_outbox.event_status")
    world.db.execute("GRANT SELECT ON cdc_outbox.event_status TO pg_monitor")
    world.db.execute("ALTER TABLE outbox RENAME TO outbox2")
    up(world, target(world, table="outbox2"))
    assert world.db.execute("SELECT count(*) FROM mine").fetchone() == (0,)
    query = "SELECT has_table_privilege('pg_monitor', 'cdc_outbox.event_status', 'SELECT')"
    assert world.db.execute(query).fetchone() == (True,)
    world.db.execute("ALTER TABLE outbox2 ALTER COLUMN id TYPE text")
    with pytest.raises(OperatorNeeded) as caught:
        up(world, target(world, table="outbox2"))
    assert "drop what depends on view cdc_outbox.event_status" in caught.value.hint
    world.db.execute("DROP VIEW mine")
    up(world, target(world, table="outbox2"))


def test_row_security_that_hides_rows_from_the_view_is_said(every_world: World) -> None:
    world = every_world
    up(world)
    world.db.execute("ALTER TABLE outbox ENABLE ROW LEVEL SECURITY")
    (warning,) = up(world)
    assert "row security may hide rows of outbox" in warning
    assert "CREATE POLICY ... ON outbox FOR SELECT TO cdc_outbox_reader USING (true)" in warning
    world.db.execute("CREATE POLICY seen ON outbox FOR SELECT TO cdc_outbox_reader USING (true)")
    assert up(world) == []


def test_an_index_of_the_outbox_serves_the_view(every_world: World) -> None:
    world = every_world
    up(world)
    world.db.execute("INSERT INTO outbox (aggregate_id, event_type) SELECT 'a', 'x' FROM generate_series(1, 5000)")
    world.db.execute("ANALYZE outbox")
    world.db.execute("SET search_path = pg_catalog")
    query = "EXPLAIN SELECT published FROM cdc_outbox.event_status WHERE outbox_id = %s"
    plan = world.db.execute(query, [uuid.uuid4()]).fetchall()
    assert any("Index Scan using outbox_pkey" in line for (line,) in plan), plan
