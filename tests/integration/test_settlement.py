"""What is known to be published, and what pruning deletes, on real servers: never what is not."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import psycopg
import pytest
from psycopg import conninfo

from cdc_outbox.config import ColumnsConfig
from cdc_outbox.errors import OperatorNeeded
from cdc_outbox.journal.continuity import Continuity
from cdc_outbox.journal.journal import Journal
from cdc_outbox.journal.settlement import Settlement
from cdc_outbox.operations import migrations, pruning
from cdc_outbox.operations.event_status import StuckRow, stuck_rows
from cdc_outbox.postgres import catalog
from cdc_outbox.postgres.connection import BoundedConnection, connect, connect_bounded
from cdc_outbox.postgres.publication import check_publication
from cdc_outbox.postgres.slots import check_slot
from cdc_outbox.postgres.stream import ReplicationStream
from cdc_outbox.wal.lsn import LSN
from support.waiting import wait_until
from support.world import World

NOW = timedelta(0)


COLUMNS = "(id text, aggregate_type text, aggregate_id text, event_type text, payload text, created_at timestamptz)"


def let_updates_count_after(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    for name in ("settlement.COUNTED_SECONDS", "snapshots.COUNTED_SECONDS"):
        monkeypatch.setattr(f"cdc_outbox.journal.{name}", seconds)
    monkeypatch.setattr("cdc_outbox.journal.snapshots._REPORTED_SECONDS", min(seconds, 1))


@pytest.fixture(autouse=True)
def updates_are_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But where a test is about how long that takes."""
    let_updates_count_after(monkeypatch, 0)


@pytest.fixture
def migrated(every_world: World) -> World:
    """With an outbox whose ids a test can choose to say what they are."""
    make_outbox(every_world)
    every_world.migrate()
    return every_world


@contextlib.contextmanager
def another_session(world: World) -> Iterator[psycopg.Connection]:
    """In a transaction of its own, left open."""
    with psycopg.connect(world.dsn) as connection:
        yield connection


def make_outbox(world: World, partitioning: str = "") -> None:
    world.db.execute(f"CREATE TABLE outbox {COLUMNS} {partitioning}")
    world.db.execute("ALTER TABLE outbox ALTER created_at SET DEFAULT now()")
    if world.db.info.server_version < 150000:
        wait_until(lambda: has_counts(world), "the statistics collector knows the database")


def has_counts(world: World) -> bool:
    """14 makes a database's counts with its first report, and what was seen before says nothing of what comes after."""
    row = world.db.execute(
        "SELECT pg_stat_get_db_stat_reset_time(oid) FROM pg_database WHERE datname = current_database()"
    ).fetchone()
    assert row
    return row[0] is not None


def insert(connection: psycopg.Connection, name: str) -> None:
    connection.execute("INSERT INTO outbox (id, aggregate_id, event_type) VALUES (%s, 'a', 't')", [name])


def settlement(world: World, *, confirmed: LSN | None = None) -> Settlement:
    row = world.db.execute("SELECT system_identifier::text FROM pg_control_system()").fetchone()
    assert row
    (publication,) = world.db.execute("SELECT pubname FROM pg_publication").fetchone() or ("",)
    sent = check_publication(world.db, publication, catalog.find_table(world.db, "public.outbox"))
    return Settlement(world.db, world.slot, row[0], sent, confirmed=confirmed or world.confirmed_lsn())


def end_of_log(world: World) -> LSN:
    """Of what is inserted, not only written: a transaction that is open may be ahead of the disk."""
    row = world.db.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
    assert row
    return LSN.parse(row[0])


def take(session: Settlement) -> None:
    session._take_at = 0  # a second is over
    session.carried()
    session.take_if_due()  # False while something is open that was open in all snapshots so far


def settle(session: Settlement, world: World) -> None:
    """As if the relay had published all there is."""
    take(session)
    session.settled(end_of_log(world))


def published(world: World) -> set[str]:
    rows = world.db.execute("SELECT outbox_id FROM cdc_outbox.event_status WHERE published").fetchall()
    return {name for (name,) in rows}


def prune(world: World, *, older_than: timedelta = NOW) -> pruning.Pruned:
    with connect(world.dsn) as connection:
        table = catalog.find_table(connection, "public.outbox")
        return pruning.prune(connection, table, "id", world.slot, older_than=older_than, progress=lambda *_: None)


def left(world: World) -> set[str]:
    return {name for (name,) in world.db.execute("SELECT id FROM outbox").fetchall()}


def stuck(world: World, *, seconds: float = 0) -> list[StuckRow]:
    table = catalog.find_table(world.db, "public.outbox")
    count, rows = stuck_rows(world.db, table, ColumnsConfig(), world.slot, patience=timedelta(seconds=seconds))
    assert count == len(rows)
    return rows


def test_what_was_settled_is_published_and_pruned(migrated: World) -> None:
    insert(migrated.db, "before")
    session = settlement(migrated)
    take(session)
    insert(migrated.db, "after")
    session.settled(end_of_log(migrated))
    assert published(migrated) == {"before"}
    assert prune(migrated, older_than=timedelta(hours=1)).rows == 0
    assert prune(migrated).rows == 1
    assert left(migrated) == {"after"}


def test_a_snapshot_is_noted_when_its_lsn_is_settled_and_not_before(migrated: World) -> None:
    insert(migrated.db, "one")
    session = settlement(migrated)
    before = migrated.confirmed_lsn()
    take(session)
    session.settled(before)
    assert published(migrated) == set()
    session.settled(end_of_log(migrated))
    assert published(migrated) == {"one"}


def test_rows_of_a_transaction_in_flight_are_unknown_until_it_is_settled(migrated: World) -> None:
    session = settlement(migrated)
    with another_session(migrated) as long_running:
        insert(long_running, "early in a long transaction")
        insert(migrated.db, "beside it")
        settle(session, migrated)
        insert(long_running, "late in a long transaction")
        long_running.commit()
    assert prune(migrated).rows == 0  # the one beside it is published, but that cannot be told from a subtransaction
    settle(session, migrated)
    assert prune(migrated).rows == 3


def test_subtransactions_count_as_the_transaction_they_belong_to(migrated: World) -> None:
    session = settlement(migrated)
    with another_session(migrated) as long_running:
        insert(long_running, "outside")
        for number in range(100):  # more than a snapshot could hold
            with long_running.transaction():
                insert(long_running, f"inside {number}")
        settle(session, migrated)
        long_running.commit()
    assert published(migrated) == set()
    assert prune(migrated).rows == 0
    settle(session, migrated)
    assert prune(migrated).rows == 101


def test_rows_of_an_aborted_transaction_do_not_matter(migrated: World) -> None:
    session = settlement(migrated)
    with another_session(migrated) as aborted:
        insert(aborted, "never")
        aborted.rollback()
    insert(migrated.db, "committed")
    settle(session, migrated)
    assert prune(migrated).rows == 1
    assert left(migrated) == set()


def test_what_was_there_before_the_slot_is_never_known(every_world: World) -> None:
    world = every_world
    make_outbox(world)
    insert(world.db, "before the slot")
    world.migrate()
    insert(world.db, "after the slot")
    settle(settlement(world), world)
    assert published(world) == {"after the slot"}
    assert prune(world).rows == 1
    assert left(world) == {"before the slot"}
    assert stuck(world) == []


def test_what_was_lost_with_a_slot_stays_unknown(migrated: World) -> None:
    """The gap of a slot created again by hand, which the operator has accepted."""
    note_confirmation(migrated)
    insert(migrated.db, "published")
    settle(settlement(migrated), migrated)
    migrated.db.execute("SELECT pg_drop_replication_slot(%s)", [migrated.slot])
    insert(migrated.db, "lost")
    migrated.db.execute(f"SELECT pg_create_logical_replication_slot('{migrated.slot}', 'pgoutput')")
    migrated.db.execute("DELETE FROM cdc_outbox.confirmation")
    settlement(migrated)  # ends at once: what is covered no more must have been noted
    note_confirmation(migrated)
    session = settlement(migrated)
    settle(session, migrated)
    insert(migrated.db, "published again")
    settle(session, migrated)
    assert published(migrated) == {"published", "published again"}
    assert prune(migrated).rows == 2
    assert left(migrated) == {"lost"}


def test_a_slot_that_migrate_created_again_knows_all_that_came_after_it(migrated: World) -> None:
    note_confirmation(migrated)
    migrated.db.execute("SELECT pg_drop_replication_slot(%s)", [migrated.slot])
    insert(migrated.db, "lost")
    migrated.db.execute("DELETE FROM cdc_outbox.confirmation")
    migrated.migrate()
    insert(migrated.db, "before the relay")
    settle(settlement(migrated), migrated)
    assert published(migrated) == {"before the relay"}


def note_confirmation(world: World) -> None:
    world.db.execute(
        "INSERT INTO cdc_outbox.confirmation (slot, system_identifier, confirmed_lsn, limit_lsn, decoded_transactions,"
        " counted_since) VALUES (%s, 'any', '0/1', '0/1', 0, '') ON CONFLICT DO NOTHING",
        [world.slot],
    )


def test_a_note_of_another_server_says_nothing(migrated: World) -> None:
    """Restored from a dump, the notes would speak of transaction ids that are others here."""
    insert(migrated.db, "one")
    settle(settlement(migrated), migrated)
    migrated.db.execute("UPDATE cdc_outbox.settled SET system_identifier = '1'")
    assert published(migrated) == set()
    assert prune(migrated).rows == 0


def test_a_transaction_id_is_made_whole_by_what_is_near(migrated: World) -> None:
    """The 32 bits of a row's xmin, against pg_current_xact_id's 64."""
    with another_session(migrated) as session:
        row = session.execute(
            "SELECT pg_current_xact_id(), cdc_outbox.full_xid(pg_current_xact_id()::xid),"
            " cdc_outbox.full_xid((pg_current_xact_id()::text::bigint + 4294967295 - 2147483640)::text::xid8::xid)"
        ).fetchone()
    assert row
    current, same, far_behind = map(int, row)
    assert same == current
    assert far_behind < current or far_behind > current + 2**31 - 100


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


def test_stuck_rows_are_those_committed_and_not_settled(migrated: World) -> None:
    insert(migrated.db, "fine")
    session = settlement(migrated)
    settle(session, migrated)
    assert stuck(migrated) == []
    insert(migrated.db, "waiting")
    assert stuck(migrated, seconds=3600) == []
    (row,) = stuck(migrated)
    assert (row.outbox_id, row.aggregate_id, row.event_type) == ("waiting", "a", "t")
    assert row.seconds is not None
    assert 0 <= row.seconds < 60
    settle(session, migrated)
    assert stuck(migrated) == []


@pytest.fixture
def bounded(migrated: World) -> Iterator[BoundedConnection]:
    with contextlib.closing(connect_bounded(migrated.dsn)) as connection:
        yield connection


@pytest.fixture
def stream(migrated: World) -> Iterator[ReplicationStream]:
    with ReplicationStream(migrated.dsn) as made:
        yield made


def test_what_was_settled_while_a_snapshot_waited_is_noted_too(
    migrated: World, bounded: BoundedConnection, stream: ReplicationStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc_outbox.journal.settlement._TAKE_EVERY_SECONDS", 0)
    continuity = Continuity(migrated.slot)
    confirmed = migrated.confirmed_lsn()
    continuity.check(migrated.db, stream.identify())
    stream.start(migrated.slot, "cdc_outbox")
    sent = check_publication(migrated.db, "cdc_outbox", catalog.find_table(migrated.db, "public.outbox"))
    journal = Journal(
        bounded,
        continuity,
        slot=check_slot(migrated.db, migrated.slot),
        started_at=LSN(0),
        sent=sent,
        walsender_pid=stream.backend_pid,
    )
    insert(migrated.db, "before the snapshot")
    journal.confirming(confirmed, carried=True)
    insert(migrated.db, "while it waits")
    journal.confirming(confirmed, carried=True)
    journal.confirming(end_of_log(migrated), carried=False)
    assert published(migrated) == {"before the snapshot"}
    journal.confirming(end_of_log(migrated), carried=False)
    assert published(migrated) == {"before the snapshot", "while it waits"}
    notes = "SELECT count(*) FROM cdc_outbox.settled"
    journal.confirming(end_of_log(migrated), carried=False)  # a second look
    journal.confirming(end_of_log(migrated), carried=False)
    before = migrated.db.execute(notes).fetchone()
    for _ in range(3):
        journal.confirming(end_of_log(migrated), carried=False)
    assert migrated.db.execute(notes).fetchone() == before  # an idle relay has nothing to add


def test_a_snapshot_is_taken_when_it_tells_more_than_the_last(migrated: World) -> None:
    session = settlement(migrated)
    settle(session, migrated)
    for _ in range(2):
        session._take_at = 0
        session.take_if_due()  # a second look at what had just come, which sees our own note end
        session.settled(end_of_log(migrated))
    session._take_at = 0
    assert not session.take_if_due()  # nothing was open, and nothing has come since
    with another_session(migrated) as long_running:
        insert(long_running, "one")
        insert(migrated.db, "beside it")
        settle(session, migrated)
        assert published(migrated) == set()
        session._take_at = 0
        assert not session.take_if_due()  # it is still open
        long_running.commit()
        assert not session.take_if_due()  # it is not a second ago
        session._take_at = 0
        assert session.take_if_due()
        assert not session.take_if_due()  # that one waits
    session.settled(end_of_log(migrated))
    assert published(migrated) == {"one", "beside it"}


def test_old_notes_are_thinned_and_say_the_same_a_little_later(migrated: World) -> None:
    insert(migrated.db, "old")
    session = settlement(migrated)
    for _ in range(5):
        settle(session, migrated)
    migrated.db.execute("UPDATE cdc_outbox.settled SET settled_at = date_trunc('hour', now()) - interval '3 hours'")
    settle(session, migrated)
    session._thin()
    counts = migrated.db.execute("SELECT count(*) FROM cdc_outbox.settled GROUP BY settled_at ORDER BY settled_at")
    assert counts.fetchall() == [(1,), (1,)]  # of the 5 and the slot's begin, the youngest
    assert prune(migrated, older_than=timedelta(hours=1)).rows == 1


def make_partitioned(world: World) -> None:
    make_outbox(world, "PARTITION BY RANGE (created_at)")
    for name, start, end in (
        ("old", "'2001-01-01'", "'2001-02-01'"),
        ("older", "MINVALUE", "'2001-01-01'"),
        ("empty", "'2001-02-01'", "'2001-03-01'"),
        ("present", "'2001-03-01'", "MAXVALUE"),
    ):
        world.db.execute(f"CREATE TABLE outbox_{name} PARTITION OF outbox FOR VALUES FROM ({start}) TO ({end})")


def insert_at(world: World, name: str, when: str) -> None:
    world.db.execute(
        "INSERT INTO outbox (id, aggregate_id, event_type, created_at) VALUES (%s, 'a', 't', %s)", [name, when]
    )


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


def unknown(world: World) -> set[str]:
    rows = world.db.execute("SELECT outbox_id FROM cdc_outbox.event_status WHERE state = 'unknown'").fetchall()
    return {name for (name,) in rows}


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


def test_two_outboxes_are_in_one_view(every_world: World) -> None:
    world = every_world
    make_outbox(world)
    world.migrate()
    insert(world.db, "one")
    settle(settlement(world), world)
    world.db.execute("CREATE TABLE other (key bigint, aggregate_id int, event_type text, payload json)")
    slot = f"{world.slot}_other"
    with connect(world.dsn) as connection:
        target = migrations.Target("other", "other", slot, ColumnsConfig(id=("key",)))
        migrations.up(connection, target, failover=False, report=lambda _: None)
        world.db.execute("INSERT INTO other VALUES (7, 8, 't')")
        assert migrations.plan(connection, target, failover=False) == []
        rows = connection.execute("SELECT outbox_id, slot, state FROM cdc_outbox.event_status ORDER BY 2").fetchall()
    assert rows == [("one", world.slot, "published"), ("7", slot, "pending")]


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
