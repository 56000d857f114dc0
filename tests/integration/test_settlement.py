"""What is known to be published, and what pruning deletes, on real servers: never what is not."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import pytest

from cdc_outbox.config import ColumnsConfig
from cdc_outbox.journal.continuity import Continuity
from cdc_outbox.journal.journal import Journal
from cdc_outbox.operations import migrations
from cdc_outbox.postgres import catalog
from cdc_outbox.postgres.connection import BoundedConnection, connect, connect_bounded
from cdc_outbox.postgres.publication import check_publication
from cdc_outbox.postgres.slots import check_slot
from cdc_outbox.postgres.stream import ReplicationStream
from cdc_outbox.wal.lsn import LSN
from support.settling import (
    another_session,
    end_of_log,
    insert,
    left,
    make_outbox,
    note_confirmation,
    prune,
    published,
    settle,
    settlement,
    stuck,
    take,
)
from support.world import World

pytestmark = pytest.mark.usefixtures("updates_are_counted_at_once")


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
