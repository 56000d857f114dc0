"""What was not sent is never published: holes, children, updates, files, counts."""

import psycopg
import pytest

from cdc_outbox.journal.settlement import Settlement
from cdc_outbox.postgres import catalog
from cdc_outbox.postgres.publication import check_publication
from support.settling import (
    another_session,
    end_of_log,
    insert,
    insert_at,
    left,
    let_updates_count_after,
    make_outbox,
    make_partitioned,
    note_confirmation,
    prune,
    published,
    settle,
    settlement,
    take,
    unknown,
)
from support.waiting import wait_until
from support.world import World

pytestmark = pytest.mark.usefixtures("updates_are_counted_at_once")


#: Each takes rows away from what is sent, and a second statement gives the outbox back: what is between never came.
HOLES = {
    "table out of the publication": (
        "ALTER PUBLICATION cdc_outbox DROP TABLE outbox",
        "ALTER PUBLICATION cdc_outbox ADD TABLE outbox",
    ),
    "other operations": (
        "ALTER PUBLICATION cdc_outbox SET (publish = 'delete')",
        "ALTER PUBLICATION cdc_outbox SET (publish = 'insert')",
    ),
    "publication created again": (
        "DROP PUBLICATION cdc_outbox",
        "CREATE PUBLICATION cdc_outbox FOR TABLE outbox WITH (publish = 'insert')",
    ),
    "unlogged": ("ALTER TABLE outbox SET UNLOGGED", "ALTER TABLE outbox SET LOGGED"),
    "row filter": (
        "ALTER PUBLICATION cdc_outbox SET TABLE outbox WHERE (id = 'none')",
        "ALTER PUBLICATION cdc_outbox SET TABLE outbox",
    ),
    "schema out of the publication": (
        "CREATE SCHEMA away; ALTER TABLE outbox SET SCHEMA away",
        "ALTER TABLE away.outbox SET SCHEMA public",
    ),
}


FILTERS_SINCE = 15


def may_be_tried(world: World, hole: str) -> bool:
    return world.db.info.server_version >= FILTERS_SINCE * 10_000 or hole not in (
        "row filter",
        "schema out of the publication",
    )


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("seen", [True, False], ids=["a snapshot in the hole", "no snapshot in the hole"])
def test_what_was_not_sent_is_never_published(migrated: World, hole: str, *, seen: bool) -> None:
    """Whether the relay looked meanwhile, or was away and finds everything as it was."""
    world = migrated
    if not may_be_tried(world, hole):
        return  # 14 knows no such thing
    if hole == "unlogged":  # which a table that is listed by itself cannot be
        world.db.execute("DROP PUBLICATION cdc_outbox")
        world.db.execute("CREATE PUBLICATION cdc_outbox FOR ALL TABLES WITH (publish = 'insert')")
    if hole == "schema out of the publication":
        world.db.execute("ALTER PUBLICATION cdc_outbox DROP TABLE outbox")
        world.db.execute("ALTER PUBLICATION cdc_outbox ADD TABLES IN SCHEMA public")
    note_confirmation(world)
    session = settlement(world)
    settle(session, world)
    insert(world.db, "before")
    settle(session, world)
    begin, end = HOLES[hole]
    world.db.execute(begin.encode())
    if seen:
        take(session)
    table = "away.outbox" if "schema" in hole else "outbox"
    world.db.execute(f"INSERT INTO {table} (id, aggregate_id, event_type) VALUES ('in the hole', 'a', 't')".encode())
    if seen:
        session.settled(end_of_log(world))
        settle(session, world)
    world.db.execute(end.encode())
    session = settlement(world)
    settle(session, world)
    insert(world.db, "after")
    settle(session, world)
    assert "in the hole" in unknown(world)
    assert "after" in published(world)
    if hole != "unlogged":  # that rewrites the table
        assert "before" in published(world)
    prune(world)
    assert "in the hole" in left(world)
    assert "after" not in left(world)


def test_a_partition_with_rows_that_is_attached_brings_none_that_was_sent(every_world: World) -> None:
    world = every_world
    make_partitioned(world)
    world.migrate(publication="parted")
    note_confirmation(world)
    session = settlement(world)
    settle(session, world)
    world.db.execute("ALTER TABLE outbox DETACH PARTITION outbox_old")
    world.db.execute("INSERT INTO outbox_old (id, aggregate_id, created_at) VALUES ('alone', 'a', '2001-01-10')")
    world.db.execute("ALTER TABLE outbox ATTACH PARTITION outbox_old FOR VALUES FROM ('2001-01-01') TO ('2001-02-01')")
    for _ in range(2):
        settle(session, world)
    insert_at(world, "together", "2001-01-11")
    insert_at(world, "elsewhere", "now")
    settle(session, world)
    assert unknown(world) == {"alone"}
    assert published(world) == {"together", "elsewhere"}
    assert prune(world).partitions == ()
    assert left(world) == {"alone", "together", "elsewhere"}


def test_rows_of_children_are_never_published(migrated: World) -> None:
    migrated.db.execute("CREATE TABLE child () INHERITS (outbox)")
    session = settlement_of_anything(migrated)
    migrated.db.execute("INSERT INTO child (id, aggregate_id, event_type) VALUES ('child', 'a', 't')")
    insert(migrated.db, "own")
    settle(session, migrated)
    assert unknown(migrated) == {"child"}
    prune(migrated)
    assert left(migrated) == {"child"}


def settlement_of_anything(world: World) -> Settlement:
    """Of a table that the relay would not start with."""
    table = catalog.find_table(world.db, "public.outbox")
    sent = check_publication(world.db, "cdc_outbox", table, ignored={"public.child"})
    row = world.db.execute("SELECT system_identifier::text FROM pg_control_system()").fetchone()
    assert row
    return Settlement(world.db, world.slot, row[0], sent, confirmed=world.confirmed_lsn())


def with_history(world: World) -> Settlement:
    """A session of an outbox that held a row already when the slot began."""
    make_outbox(world)
    insert(world.db, "never sent")
    world.migrate()
    note_confirmation(world)
    session = settlement(world)
    settle(session, world)
    return session


def counted_updates(world: World) -> int:
    row = world.db.execute("SELECT pg_stat_get_tuples_updated('outbox'::regclass)").fetchone()
    assert row
    return int(row[0])


@pytest.mark.parametrize(
    "update",
    [
        "UPDATE outbox SET payload = 'x'",
        "UPDATE outbox SET id = id",
        "INSERT INTO outbox (id) VALUES ('never sent') ON CONFLICT (id) DO UPDATE SET payload = 'y'",
    ],
)
def test_an_update_makes_nothing_published(every_world: World, update: str) -> None:
    world = every_world
    session = with_history(world)
    world.db.execute("CREATE UNIQUE INDEX ON outbox (id)")
    insert(world.db, "sent")
    settle(session, world)
    before = counted_updates(world)
    world.db.execute(update.encode())
    wait_until(lambda: counted_updates(world) > before, "it is counted")
    for _ in range(3):
        settle(session, world)
    assert "never sent" in unknown(world)
    insert(world.db, "sent later")
    settle(session, world)
    assert "sent later" in published(world)
    prune(world)
    assert "never sent" in left(world)
    assert "sent later" not in left(world)


@pytest.mark.rest
def test_an_update_that_is_counted_late_makes_nothing_published(
    every_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that has just told of its doings keeps the next ones to itself for up to ten seconds."""
    world = every_world
    session = with_history(world)
    let_updates_count_after(monkeypatch, 11)
    before = counted_updates(world)

    def look() -> None:
        session._take_at = 0
        if session.take_if_due():
            session.settled(end_of_log(world))
        assert published(world) == set()

    with psycopg.connect(world.dsn, autocommit=True) as other:
        insert(other, "sent")
        other.execute("UPDATE outbox SET payload = 'x' WHERE id = 'never sent'")
        look()

        def is_counted() -> bool:
            look()
            if world.db.info.server_version < 150000:
                other.execute("SELECT")  # 14 tells with the next statement only
            return counted_updates(world) > before

        wait_until(is_counted, "the update is counted", timeout_seconds=30)
    settle(session, world)
    settle(session, world)
    assert unknown(world) == {"never sent", "sent"}


def test_what_a_heap_with_a_history_has_is_told_when_updates_are_counted(
    every_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = every_world
    session = with_history(world)
    let_updates_count_after(monkeypatch, 1)
    insert(world.db, "sent")
    settle(session, world)
    assert published(world) == set()

    def is_told() -> bool:
        if session.take_if_due():  # on an idle relay: nothing else was carried
            session.settled(end_of_log(world))
        return published(world) == {"sent"}

    wait_until(is_told, "it is told")


def test_updates_do_not_matter_where_nothing_was_there_before(migrated: World) -> None:
    session = settlement(migrated)
    insert(migrated.db, "sent")
    settle(session, migrated)
    migrated.db.execute("UPDATE outbox SET payload = 'x'")
    settle(session, migrated)
    assert published(migrated) == {"sent"}


def test_what_a_transaction_wrote_that_was_open_when_a_table_came_is_unknown(migrated: World) -> None:
    """It may have written before the table was in the publication, and after."""
    migrated.db.execute("ALTER PUBLICATION cdc_outbox DROP TABLE outbox")
    note_confirmation(migrated)
    with another_session(migrated) as long_running:
        insert(long_running, "early")
        migrated.db.execute("ALTER PUBLICATION cdc_outbox ADD TABLE outbox")
        session = settlement(migrated)
        settle(session, migrated)
        insert(long_running, "late")
        long_running.commit()
    insert(migrated.db, "after")
    settle(session, migrated)
    settle(session, migrated)
    assert published(migrated) == {"after"}
    assert unknown(migrated) == {"early", "late"}


def test_a_grant_and_a_vacuum_break_nothing(migrated: World) -> None:
    session = settlement(migrated)
    insert(migrated.db, "before")
    for statement in ("GRANT SELECT ON outbox TO PUBLIC", "VACUUM outbox", "ANALYZE outbox", "VACUUM FREEZE outbox"):
        migrated.db.execute(statement.encode())
        settle(session, migrated)
    assert published(migrated) == {"before"}
    assert unknown(migrated) == set()


def test_rows_that_were_moved_into_another_file_are_not_known_by_the_old_one(every_world: World) -> None:
    """As pg_repack does: a copy, committed long before it takes the table's place."""
    world = every_world
    session = with_history(world)
    insert(world.db, "sent")
    settle(session, world)
    assert published(world) == {"sent"}
    world.db.execute("CREATE TABLE copied (LIKE outbox)")
    world.db.execute("INSERT INTO copied SELECT * FROM outbox")
    settle(session, world)
    for table in ("outbox", "copied"):
        world.db.execute(f"VACUUM {table}".encode())
    swap = """
        UPDATE pg_class SET relfilenode = (SELECT relfilenode FROM pg_class AS c WHERE c.oid = other.oid)
          FROM pg_class AS other
         WHERE (pg_class.relname, other.relname) IN (('outbox', 'copied'), ('copied', 'outbox'))
    """
    world.db.execute(swap.encode())
    settle(session, world)
    settle(session, world)
    assert published(world) == set()
    prune(world)
    assert left(world) == {"never sent", "sent"}


def test_a_partition_that_was_made_while_nothing_happened(every_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world = every_world
    make_outbox(world, "PARTITION BY RANGE (created_at)")
    world.migrate(publication="parted")
    session = settlement(world)
    settle(session, world)
    monkeypatch.setattr("cdc_outbox.journal.settlement._LOOK_EVERY_SECONDS", 0)
    world.db.execute("CREATE TABLE outbox_new PARTITION OF outbox DEFAULT")
    for _ in range(2):
        session._take_at = 0
        session.take_if_due()
        session.settled(end_of_log(world))
    insert(world.db, "first")
    settle(session, world)
    assert published(world) == {"first"}


def test_a_reset_of_the_counts_is_no_proof(every_world: World) -> None:
    world = every_world
    session = with_history(world)
    insert(world.db, "sent")
    settle(session, world)
    world.db.execute("UPDATE outbox SET payload = 'x' WHERE id = 'never sent'")
    wait_until(lambda: counted_updates(world) > 0, "it is counted")
    world.db.execute("SELECT pg_stat_reset()")
    wait_until(lambda: counted_updates(world) == 0, "it is reset")
    session = settlement(world)
    settle(session, world)
    settle(session, world)
    assert "never sent" in unknown(world)
