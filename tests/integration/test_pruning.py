"""What pruning deletes: nothing that is not known to be published."""

from datetime import timedelta

import pytest
from psycopg import conninfo

from cdc_outbox.errors import OperatorNeeded
from cdc_outbox.operations import pruning
from cdc_outbox.postgres import catalog
from cdc_outbox.postgres.connection import connect
from support.settling import (
    COLUMNS,
    NOW,
    another_session,
    insert,
    insert_at,
    left,
    make_outbox,
    make_partitioned,
    prune,
    published,
    settle,
    settlement,
    stuck,
)
from support.world import World

pytestmark = pytest.mark.usefixtures("updates_are_counted_at_once")


def test_a_dead_letter_keeps_its_row_until_it_is_redriven(migrated: World) -> None:
    for name in ("open", "redriven", "fine"):
        insert(migrated.db, name)
    for name, state in (("open", "dead"), ("redriven", "redriven")):
        migrated.db.execute(
            "INSERT INTO cdc_outbox.parked (system_identifier, slot, commit_lsn, ordinal, committed_at, event_id,"
            " reason, detail, state) VALUES ('s', %s, %s, 0, now(), %s, 'too_large', '', %s)",
            [migrated.slot, "0/1" if state == "dead" else "0/2", name, state],
        )
    assert {row.outbox_id for row in stuck(migrated)} == {"fine"}
    settle(settlement(migrated), migrated)
    rows = migrated.db.execute(
        "SELECT outbox_id, published, publish_attempts, processed_at IS NULL FROM cdc_outbox.event_status ORDER BY 1"
    ).fetchall()
    assert rows == [("fine", True, 1, False), ("open", False, 1, True), ("redriven", True, 2, False)]
    assert prune(migrated).rows == 2
    assert left(migrated) == {"open"}


def test_a_table_partitioned_by_time_loses_whole_partitions(every_world: World) -> None:
    world = every_world
    make_partitioned(world)
    world.migrate(publication="parted")
    session = settlement(world)
    insert_at(world, "older", "2000-01-01")
    insert_at(world, "now", "now")
    settle(session, world)
    insert_at(world, "old, not settled", "2001-01-10")
    assert published(world) == {"older", "now"}
    assert prune(world, older_than=timedelta(hours=1)) == pruning.Pruned(0)
    assert prune(world) == pruning.Pruned(1, ('"public"."outbox_older"',))
    assert left(world) == {"now", "old, not settled"}
    settle(session, world)
    with another_session(world) as reader:
        reader.execute("SELECT FROM outbox_old")
        assert prune(world) == pruning.Pruned(0, busy=('"public"."outbox_old"',))
    assert prune(world).partitions == ('"public"."outbox_old"',)
    assert left(world) == {"now"}


def test_a_table_partitioned_otherwise_loses_rows(every_world: World) -> None:
    world = every_world
    make_outbox(world, "PARTITION BY HASH (aggregate_id)")
    for number in range(2):
        world.db.execute(
            f"CREATE TABLE outbox_{number} PARTITION OF outbox FOR VALUES WITH (MODULUS 2, REMAINDER {number})"
        )
    world.migrate(publication="parted")
    session = settlement(world)
    for number in range(20):
        world.db.execute(
            "INSERT INTO outbox (id, aggregate_id, event_type) VALUES (%s, %s, 't')", [f"{number}", f"a-{number}"]
        )
    settle(session, world)
    insert(world.db, "later")
    assert prune(world).rows == 20
    assert left(world) == {"later"}


def test_a_large_table_is_pruned_a_few_blocks_at_a_time(migrated: World) -> None:
    migrated.db.execute(
        "INSERT INTO outbox (id, aggregate_id, event_type, payload)"
        " SELECT n, 'a', 't', repeat('x', 1000) FROM generate_series(1, 5000) AS n"
    )
    settle(settlement(migrated), migrated)
    seen: list[tuple[int, int]] = []
    with connect(migrated.dsn) as connection:
        table = catalog.find_table(connection, "public.outbox")
        pruned = pruning.prune(
            connection, table, "id", migrated.slot, older_than=NOW, progress=lambda *done: seen.append(done)
        )
    assert pruned.rows == 5000
    assert len(seen) > 3
    assert seen[-1][0] == seen[-1][1]


def test_a_role_that_may_not_delete_is_told_so(migrated: World) -> None:
    migrated.db.execute("ALTER ROLE cdc_outbox_relay PASSWORD 'pw'")
    dsn = conninfo.make_conninfo(migrated.dsn, user="cdc_outbox_relay", password="pw")
    with connect(dsn) as connection:
        table = catalog.find_table(connection, "public.outbox")
        insert(migrated.db, "one")
        settle(settlement(migrated), migrated)
        with pytest.raises(OperatorNeeded, match=r"pruning public.outbox: permission denied"):
            pruning.prune(connection, table, "id", migrated.slot, older_than=NOW, progress=lambda *_: None)
    assert left(migrated) == {"one"}


def test_a_row_without_an_id_is_unknown(every_world: World) -> None:
    """Whether it has become a dead letter nobody could tell."""
    world = every_world
    make_outbox(world)
    world.migrate()
    session = settlement(world)
    world.db.execute("INSERT INTO outbox (aggregate_id) VALUES ('a')")
    settle(session, world)
    assert world.db.execute("SELECT state FROM cdc_outbox.event_status").fetchall() == [("unknown",)]
    assert prune(world).rows == 0


def test_a_dead_letter_of_a_padded_id_keeps_its_row(every_world: World) -> None:
    world = every_world
    world.db.execute(f"CREATE TABLE outbox {COLUMNS.replace('id text', 'id char(8)', 1)}".encode())
    world.migrate()
    session = settlement(world)
    world.db.execute("INSERT INTO outbox (id, aggregate_id) VALUES ('dead', 'a')")
    world.db.execute(
        "INSERT INTO cdc_outbox.parked (system_identifier, slot, commit_lsn, ordinal, committed_at, event_id,"
        " reason, detail, state) VALUES ('s', %s, '0/1', 0, now(), 'dead    ', 'too_large', '', 'dead')",
        [world.slot],
    )
    settle(session, world)
    assert world.db.execute("SELECT state FROM cdc_outbox.event_status").fetchall() == [("dead",)]
    assert prune(world).rows == 0
