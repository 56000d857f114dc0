"""The replication stream against real servers, of every version that is here."""

import psycopg
import pytest

from cdc_outbox.errors import ConfigurationError, OperatorNeeded, SlotInUse, SourceUnavailable
from cdc_outbox.postgres.stream import ReplicationStream
from cdc_outbox.wal import pgoutput
from cdc_outbox.wal.lsn import LSN
from cdc_outbox.wal.row_plan import compile_insert_reader
from support import golden
from support.waiting import wait_until
from support.world import World, make_world


def read_until_commits(stream: ReplicationStream, commits: int) -> list[bytes]:
    """The frames of so many transactions with events; before 15 the server sends those without any too."""
    frames: list[bytes] = []

    def enough() -> bool:
        frames.extend(stream.frames())
        stream.receive()
        return with_events(frames) >= commits

    wait_until(enough, f"{commits} commits")
    return frames


def with_events(frames: list[bytes]) -> int:
    tags = b"".join(frame[25:26] for frame in frames if frame[25:26] in b"BIC")
    return sum(b"I" in transaction for transaction in tags.split(b"C")[:-1])


def ids(frames: list[bytes]) -> list[bytes]:
    relation = next(pgoutput.read_relation(frame) for frame in frames if frame[25:26] == b"R")
    read = compile_insert_reader(relation, ["aggregate_id"])
    return [read(frame)[0] for frame in frames if frame[25:26] == b"I"]


def test_committed_rows_come_in_commit_order_and_no_others(every_world: World) -> None:
    world = every_world
    world.migrate()
    with psycopg.connect(world.dsn) as other, world.db.transaction():
        world.insert("t", "1")
        other.execute("INSERT INTO outbox (aggregate_id, event_type) VALUES ('2', 'x')")
        other.commit()
        other.execute("INSERT INTO outbox (aggregate_id, event_type) VALUES ('rolled back', 'x')")
        other.rollback()
        with world.db.transaction(force_rollback=True):
            world.insert("t", "savepoint")
        world.insert("t", "3")
    with world.db.cursor().copy("COPY outbox (aggregate_id, event_type) FROM STDIN") as copy:
        copy.write("4\tx\n5\tx\n")
    with ReplicationStream(world.dsn) as stream:
        stream.start(world.slot, "cdc_outbox")
        assert ids(read_until_commits(stream, 3)) == [b"2", b"1", b"3", b"4", b"5"]


def test_what_is_confirmed_is_not_sent_again(every_world: World) -> None:
    world = every_world
    world.migrate()
    world.insert("t", "1")
    world.insert("t", "2")
    with ReplicationStream(world.dsn) as stream:
        stream.start(world.slot, "cdc_outbox")
        frames = read_until_commits(stream, 2)
        first_commit = next(
            frame for number, frame in enumerate(frames, 1) if frame[25:26] == b"C" and with_events(frames[:number])
        )
        end_lsn = LSN(pgoutput.read_commit(first_commit)[2])
        stream.send_status(end_lsn)
        stream.end(5)
        assert world.confirmed_lsn() == end_lsn
    with ReplicationStream(world.dsn) as stream:
        stream.start(world.slot, "cdc_outbox")
        assert ids(read_until_commits(stream, 1)) == [b"2"]


def test_golden_bytes_are_still_what_this_server_sends(every_world: World) -> None:
    frames = golden.capture(every_world.dsn)
    inserts = [frame for frame in frames if frame[25:26] == b"I"]
    relations = [pgoutput.read_relation(frame) for frame in frames if frame[25:26] == b"R"]
    assert [len(relation.columns) for relation in relations] == [8, 9]
    read = compile_insert_reader(relations[0], ["raw", "at"])
    assert read(inserts[0]) == (b"\\xdeadbeef", b"2024-02-29 12:00:00.5+00")


def test_text_does_not_depend_on_the_database_settings(every_world: World) -> None:
    for setting in ("bytea_output = 'escape'", "datestyle = 'German'", "timezone = 'Asia/Tokyo'"):
        every_world.db.execute(f'ALTER DATABASE "{every_world.name}" SET {setting}'.encode())
    test_golden_bytes_are_still_what_this_server_sends(every_world)


def test_a_slot_has_one_reader(every_world: World) -> None:
    world = every_world
    world.migrate()
    with ReplicationStream(world.dsn) as first, ReplicationStream(world.dsn) as second:
        first.start(world.slot, "cdc_outbox")
        with pytest.raises(SlotInUse, match="is active for PID"):
            second.start(world.slot, "cdc_outbox")
        first.end(5)
        second.start(world.slot, "cdc_outbox")


def test_a_missing_slot_needs_an_operator(every_world: World) -> None:
    missing = pytest.raises(OperatorNeeded, match='"nope" does not exist')
    with ReplicationStream(every_world.dsn) as stream, missing:
        stream.start("nope", "cdc_outbox")


def test_a_slot_name_must_be_one(world: World) -> None:
    with ReplicationStream(world.dsn) as stream, pytest.raises(ConfigurationError, match="is not a slot name"):
        stream.start('x" LOGICAL 0/0; --', "cdc_outbox")


def test_odd_publication_names_are_quoted(every_world: World) -> None:
    world = every_world
    name = """it's "odd", really"""
    world.db.execute("CREATE TABLE odd (aggregate_id text)")
    world.db.execute(psycopg.sql.SQL("CREATE PUBLICATION {} FOR TABLE odd").format(psycopg.sql.Identifier(name)))
    with ReplicationStream(world.dsn) as stream:
        stream.create_temporary_slot(f"tmp_{world.name}", lock_timeout_seconds=5)
        stream.start(f"tmp_{world.name}", name)
        world.db.execute("INSERT INTO odd VALUES ('1')")
        assert ids(read_until_commits(stream, 1)) == [b"1"]


def test_a_terminated_walsender_is_unavailable_and_says_why(every_world: World) -> None:
    world = every_world
    world.migrate()
    with ReplicationStream(world.dsn) as stream:
        stream.start(world.slot, "cdc_outbox")
        world.db.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s", [world.slot]
        )

        def broken() -> bool:
            list(stream.frames())
            return stream.receive() and False

        with pytest.raises(SourceUnavailable, match="terminating connection due to administrator command"):
            wait_until(broken, "an error")


def test_a_stream_that_the_server_ended_unheard_is_given_up(every_world: World) -> None:
    world = every_world
    world.migrate()
    with ReplicationStream(world.dsn) as stream:
        stream.start(world.slot, "cdc_outbox")
        assert not stream.is_given_up()
        world.db.execute("SELECT pg_terminate_backend(%s)", [stream.backend_pid])
        wait_until(stream.is_given_up, "the slot is free, though nothing was read")


def test_a_large_row_comes_whole(every_world: World) -> None:
    world = every_world
    world.migrate()
    payload = '{"x": "' + "ä" * 3_000_000 + '"}'
    world.insert("t", payload=payload)
    with ReplicationStream(world.dsn) as stream:
        stream.start(world.slot, "cdc_outbox")
        frames = read_until_commits(stream, 1)
        relation = next(pgoutput.read_relation(frame) for frame in frames if frame[25:26] == b"R")
        (insert,) = [frame for frame in frames if frame[25:26] == b"I"]
        assert compile_insert_reader(relation, ["payload"])(insert) == (payload.encode(),)


@pytest.mark.parametrize(("encoding", "codec"), [("UTF8", "utf-8"), ("LATIN1", "latin-1"), ("EUC_JIS_2004", "utf-8")])
def test_text_comes_as_utf8_or_as_it_is_stored(postgres: str, kafka: str, encoding: str, codec: str) -> None:
    with make_world(postgres, kafka, encoding=encoding) as world:
        world.migrate()
        world.insert("t", "ü")
        with ReplicationStream(world.dsn) as stream:
            stream.start(world.slot, "cdc_outbox")
            assert ids(read_until_commits(stream, 1)) == ["ü".encode(codec)]


@pytest.mark.parametrize("trouble", ["made after the slot", "dropped while streaming"])
def test_nothing_is_confirmed_past_a_publication_that_does_not_serve(every_world: World, trouble: str) -> None:
    """PostgreSQL 18 only warns, sends nothing and goes on; those before it end the stream with an error."""
    world = every_world
    world.migrate()
    world.db.execute("CREATE TABLE t (a int)")
    world.db.execute("CREATE PUBLICATION served FOR TABLE outbox, t")
    if trouble == "dropped while streaming":
        world.db.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [world.slot])
    else:
        world.db.execute("DROP PUBLICATION served")
        world.insert("t")
        world.db.execute("CREATE PUBLICATION served FOR TABLE outbox")
    with ReplicationStream(world.dsn) as stream:
        stream.start(world.slot, "served")
        if trouble == "dropped while streaming":
            world.insert("t")
            read_until_commits(stream, 1)
            world.db.execute("DROP PUBLICATION served")
            world.insert("t")

        def refused() -> OperatorNeeded | None:
            try:
                assert sum(frame[25:26] == b"I" for frame in stream.frames()) == 0
                stream.receive()
                stream.send_status(LSN(0))
            except OperatorNeeded as error:
                return error
            return None

        error = wait_until(refused, "it is said")
        assert error
        assert 'publication "served"' in error.message
        assert error.hint
