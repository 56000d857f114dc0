"""Continuity against real servers: a slot that is not the one that was confirmed to is noticed, any other is not."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest

from cdc_outbox.errors import OperatorNeeded, SourceUnavailable
from cdc_outbox.journal.continuity import HEADROOM_BYTES, Continuity
from cdc_outbox.postgres.connection import connect
from cdc_outbox.postgres.stream import ReplicationStream
from cdc_outbox.wal.lsn import LSN
from support.waiting import wait_until
from support.world import World


@pytest.fixture
def migrated(every_world: World) -> World:
    every_world.migrate()
    return every_world


def check(world: World, continuity: Continuity) -> bool:
    with connect(world.dsn) as connection, ReplicationStream(world.dsn) as stream:
        continuity.check(connection, stream.identify())
    return continuity.is_noted


@contextmanager
def streaming(world: World) -> Iterator[ReplicationStream]:
    with ReplicationStream(world.dsn) as stream:
        stream.start(world.slot, "cdc_outbox")
        yield stream
        stream.end(3)


def relay_one(world: World, continuity: Continuity, *, limit_bytes: int = HEADROOM_BYTES) -> LSN:
    """One event, decoded and confirmed as a relay would."""
    assert check(world, continuity)
    before = decoded_transactions(world)
    world.insert("t")
    with streaming(world) as stream:
        end = world.current_lsn()

        def counted() -> bool:
            list(stream.frames())
            stream.receive()
            return decoded_transactions(world) > before

        wait_until(counted, "the server has decoded and counted it")
        with connect(world.dsn) as connection:
            continuity.note(connection, end, limit=LSN(end + limit_bytes), walsender_pid=stream.backend_pid)
        stream.send_status(end)
        continuity.confirmed(end)
    return end


def decoded_transactions(world: World) -> int:
    row = world.db.execute(
        "SELECT total_txns FROM pg_stat_replication_slots WHERE slot_name = %s", [world.slot]
    ).fetchone()
    return row[0] if row else 0


def create_again(world: World) -> None:
    world.db.execute("SELECT pg_drop_replication_slot(%s)", [world.slot])
    world.insert("t")
    world.db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [world.slot])
    wait_until(lambda: not decoded_transactions(world), "the count was reset")  # 14 takes half a second for it


def test_reading_starts_where_all_before_is_known_to_be_acknowledged(migrated: World) -> None:
    continuity = Continuity(migrated.slot)
    assert check(migrated, continuity)
    assert continuity.start_lsn == migrated.confirmed_lsn(), "as `migrate` noted it"
    noted = relay_one(migrated, continuity)
    confirmed = LSN(noted + 100)  # what the server forgets in a crash
    continuity.confirmed(confirmed)
    check(migrated, continuity)
    assert continuity.start_lsn == confirmed, "the note is the one that this process wrote"
    another = Continuity(migrated.slot)
    check(migrated, another)
    assert another.start_lsn == noted, "as a process that knows nothing else"
    end = relay_one(migrated, another)
    check(migrated, continuity)
    assert continuity.start_lsn == end, "somebody else has relayed meanwhile"
    relay_one(migrated, another)
    migrated.db.execute("UPDATE cdc_outbox.confirmation SET confirmed_lsn = %s::pg_lsn", [str(noted)])
    check(migrated, another)
    assert another.start_lsn == noted, "the server has lost what was written last"
    with streaming(migrated) as stream, connect(migrated.dsn) as connection:
        another.note(connection, noted, limit=LSN(noted + HEADROOM_BYTES), walsender_pid=stream.backend_pid)
    check(migrated, another)
    assert another.start_lsn == noted, "what was confirmed before that note counts no more"


def test_a_note_never_moves_back(migrated: World) -> None:
    continuity = Continuity(migrated.slot)
    end = relay_one(migrated, continuity)
    with streaming(migrated) as stream, connect(migrated.dsn) as connection:
        continuity.note(connection, LSN(end - 1000), limit=end, walsender_pid=stream.backend_pid)
    check(migrated, another := Continuity(migrated.slot))
    assert another.start_lsn == end


def test_a_slot_that_goes_on_is_not_complained_of(migrated: World) -> None:
    continuity = Continuity(migrated.slot)
    for _ in range(3):
        relay_one(migrated, continuity)
        assert check(migrated, continuity)
        assert check(migrated, Continuity(migrated.slot)), "nor by another process"
    relay_one(migrated, continuity, limit_bytes=0)
    assert check(migrated, Continuity(migrated.slot)), "after a clean stop"


@pytest.mark.parametrize("limit_bytes", [0, HEADROOM_BYTES], ids=["after a clean stop", "after a crash"])
def test_a_slot_created_again_is_noticed(migrated: World, limit_bytes: int) -> None:
    end = relay_one(migrated, Continuity(migrated.slot), limit_bytes=limit_bytes)
    create_again(migrated)
    with pytest.raises(OperatorNeeded, match=rf"was created again: .* confirmed only up to {end} ") as caught:
        check(migrated, Continuity(migrated.slot))
    statement = caught.value.hint.partition("accept the gap: ")[2].partition(", and start")[0]
    migrated.db.execute(statement.encode())
    assert check(migrated, Continuity(migrated.slot)), "accepted by the statement in the hint"


def test_a_slot_that_was_moved_is_noticed(migrated: World) -> None:
    relay_one(migrated, Continuity(migrated.slot), limit_bytes=0)
    migrated.insert("t")
    migrated.db.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [migrated.slot])
    with pytest.raises(OperatorNeeded, match="stands beyond what was confirmed"):
        check(migrated, Continuity(migrated.slot))


def test_counts_that_began_again_for_another_reason_prove_nothing(migrated: World) -> None:
    relay_one(migrated, Continuity(migrated.slot))
    migrated.db.execute("SELECT pg_stat_reset_replication_slot(%s)", [migrated.slot])

    def was_reset() -> bool:
        row = migrated.db.execute(
            "SELECT total_txns FROM pg_stat_replication_slots WHERE slot_name = %s", [migrated.slot]
        ).fetchone()
        return row == (0,)

    wait_until(was_reset, "the counts are reset")
    assert check(migrated, Continuity(migrated.slot))


def test_a_slot_that_another_relay_streams_from_is_not_judged(migrated: World) -> None:
    relay_one(migrated, Continuity(migrated.slot), limit_bytes=0)
    migrated.db.execute("UPDATE cdc_outbox.confirmation SET limit_lsn = '0/1'")
    with streaming(migrated):
        assert check(migrated, Continuity(migrated.slot))
    with pytest.raises(OperatorNeeded):
        check(migrated, Continuity(migrated.slot))


def test_another_server_is_noticed(migrated: World) -> None:
    continuity = Continuity(migrated.slot)
    relay_one(migrated, continuity)
    migrated.db.execute("UPDATE cdc_outbox.confirmation SET system_identifier = '7'")
    with pytest.raises(OperatorNeeded, match=r"another server: .* confirmed on 7; the database was restored or cloned"):
        check(migrated, Continuity(migrated.slot))


def test_a_server_that_lost_what_it_had_sent_is_noticed(migrated: World) -> None:
    continuity = Continuity(migrated.slot)
    relay_one(migrated, continuity)
    continuity.confirmed(LSN(migrated.current_lsn() + HEADROOM_BYTES))
    with pytest.raises(OperatorNeeded, match="it has lost what it had sent"):
        check(migrated, continuity)


def test_without_the_schema_or_a_right_to_it_nothing_can_be_told(every_world: World) -> None:
    world = every_world
    assert check(world, Continuity(world.slot)) is False
    world.migrate()
    role = f"{world.name}_bare"
    world.db.execute(f"CREATE ROLE {role} LOGIN REPLICATION PASSWORD 'x'".encode())
    try:
        bare = World(
            world.name, world.admin_dsn, f"{world.dsn} user={role} password=x", world.bootstrap_servers, world.db
        )
        assert check(bare, Continuity(world.slot)) is False
    finally:
        world.db.execute(f"DROP ROLE {role}".encode())


def test_a_relay_that_has_lost_the_slot_notes_nothing(migrated: World) -> None:
    """It was frozen, and wakes up behind its successor."""
    frozen, successor = Continuity(migrated.slot), Continuity(migrated.slot)
    assert check(migrated, frozen)
    with streaming(migrated) as stream:
        pid = stream.backend_pid
    end = relay_one(migrated, successor)
    noted = migrated.db.execute("SELECT * FROM cdc_outbox.confirmation").fetchall()
    with connect(migrated.dsn) as connection:
        for while_streaming in (False, True):
            taken_over = streaming(migrated) if while_streaming else nullcontext()
            with taken_over, pytest.raises(SourceUnavailable, match="not read by this relay any more"):
                frozen.note(connection, LSN(end - 8), limit=LSN(end - 8), walsender_pid=pid)
    assert migrated.db.execute("SELECT * FROM cdc_outbox.confirmation").fetchall() == noted
    assert check(migrated, successor)
