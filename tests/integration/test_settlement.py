"""What is known to be published, and what pruning deletes, on real servers: never what is not."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import psycopg
import pytest
from psycopg import conninfo

from cdc_outbox.config import ColumnsConfig
from cdc_outbox.errors import OperatorNeeded
from cdc_outbox.postgres import catalog, pruning
from cdc_outbox.postgres.connection import connect
from cdc_outbox.postgres.continuity import Continuity
from cdc_outbox.postgres.lsn import LSN
from cdc_outbox.postgres.settlement import Settlement, StuckRow, stuck_rows
from cdc_outbox.postgres.stream import ReplicationStream
from cdc_outbox.service.metrics import Metrics
from cdc_outbox.service.state import RelayState
from support.world import World

NOW = timedelta(0)


COLUMNS = "(id text, aggregate_type text, aggregate_id text, event_type text, payload text, created_at timestamptz)"


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


def insert(connection: psycopg.Connection, name: str) -> None:
    connection.execute("INSERT INTO outbox (id, aggregate_id, event_type) VALUES (%s, 'a', 't')", [name])


def settlement(world: World, *, confirmed: LSN | None = None) -> Settlement:
    row = world.db.execute("SELECT system_identifier::text FROM pg_control_system()").fetchone()
    assert row
    return Settlement(world.db, world.slot, row[0], confirmed=confirmed or world.confirmed_lsn())


def end_of_log(world: World) -> LSN:
    """Of what is inserted, not only written: a transaction that is open may be ahead of the disk."""
    row = world.db.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
    assert row
    return LSN.parse(row[0])


def take(session: Settlement) -> None:
    session._take_at = 0  # a second is over
    session.carried()
    assert session.take_if_due()


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
    """The gap of a slot made anew by hand, which the operator has accepted."""
    note_confirmation(migrated)
    insert(migrated.db, "published")
    settle(settlement(migrated), migrated)
    migrated.db.execute("SELECT pg_drop_replication_slot(%s)", [migrated.slot])
    insert(migrated.db, "lost")
    migrated.db.execute(f"SELECT pg_create_logical_replication_slot('{migrated.slot}', 'pgoutput')")
    migrated.db.execute("DELETE FROM cdc_outbox.confirmation")
    settlement(migrated)  # ends at once: it has begun, and that must have been noted
    note_confirmation(migrated)
    insert(migrated.db, "published again")
    settle(settlement(migrated), migrated)
    assert published(migrated) == {"published", "published again"}
    assert prune(migrated).rows == 2
    assert left(migrated) == {"lost"}


def test_a_slot_that_migrate_made_anew_knows_all_that_came_after_it(migrated: World) -> None:
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
    for name, state in (("open", "open"), ("redriven", "redriven")):
        migrated.db.execute(
            "INSERT INTO cdc_outbox.dead_letter (system_identifier, slot, commit_lsn, ordinal, committed_at, event_id,"
            " reason, detail, state) VALUES ('s', %s, %s, 0, now(), %s, 'too_large', '', %s)",
            [migrated.slot, "0/1" if state == "open" else "0/2", name, state],
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


def test_what_was_settled_while_a_snapshot_waited_is_noted_too(
    migrated: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc_outbox.postgres.settlement._TAKE_EVERY_SECONDS", 0)
    continuity = Continuity(migrated.slot)
    with ReplicationStream(migrated.dsn) as stream:
        continuity.check(migrated.db, stream.identify())
    confirmed = migrated.confirmed_lsn()
    state = RelayState(migrated.db, continuity, Metrics(), slot=migrated.slot, confirmed=confirmed, on_poison="stop")
    insert(migrated.db, "before the snapshot")
    state.confirming(confirmed, carried=True)
    insert(migrated.db, "while it waits")
    state.confirming(confirmed, carried=True)
    state.confirming(end_of_log(migrated), carried=False)
    assert published(migrated) == {"before the snapshot"}
    state.confirming(end_of_log(migrated), carried=False)
    assert published(migrated) == {"before the snapshot", "while it waits"}
    notes = "SELECT count(*) FROM cdc_outbox.settled"
    state.confirming(end_of_log(migrated), carried=False)  # a second look
    state.confirming(end_of_log(migrated), carried=False)
    before = migrated.db.execute(notes).fetchone()
    for _ in range(3):
        state.confirming(end_of_log(migrated), carried=False)
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
    migrated.db.execute(
        "UPDATE cdc_outbox.settled SET settled_at = date_trunc('hour', now()) - interval '3 hours'"
        " WHERE snapshot::text <> since::text"
    )
    settle(session, migrated)
    session._thin()
    counts = migrated.db.execute("SELECT count(*) FROM cdc_outbox.settled GROUP BY settled_at ORDER BY settled_at")
    assert counts.fetchall() == [(1,), (1,), (1,)]  # of the 5, of the slot's begin, the youngest
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
        with pytest.raises(OperatorNeeded, match=r"pruning public.outbox: permission denied"):
            pruning.prune(connection, table, "id", migrated.slot, older_than=NOW, progress=lambda *_: None)
    assert left(migrated) == {"one"}
