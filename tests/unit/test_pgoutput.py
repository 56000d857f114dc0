import json
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_outbox.errors import MalformedStream
from cdc_outbox.wal import pgoutput
from cdc_outbox.wal.pgoutput import Column, Relation
from cdc_outbox.wal.row_plan import compile_insert_reader
from support import frames

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.json"), key=lambda path: int(path.stem))
TABLE = Relation(7, "public", "t", (Column("a", 25), Column("b", 25), Column("c", 25)))


@pytest.fixture(params=GOLDEN, ids=lambda path: f"postgresql-{path.stem}")
def golden(request: pytest.FixtureRequest) -> list[bytes]:
    """Captured by support/golden.py from a server of that version."""
    return [bytes.fromhex(line) for line in json.loads(request.param.read_text())]


def with_tag(golden: list[bytes], tag: bytes) -> list[bytes]:
    return [frame for frame in golden if frame[25:26] == tag]


def test_golden_versions() -> None:
    assert [path.stem for path in GOLDEN] == ["14", "15", "16", "17", "18"]


def test_golden_relation(golden: list[bytes]) -> None:
    first, second = map(pgoutput.read_relation, with_tag(golden, b"R"))
    names = ["id", "label", "doc", "docb", "raw", "Odd Name", "at", "feeling"]
    assert str(first) == "public.golden"
    assert [column.name for column in first.columns] == names
    assert [column.type_oid for column in first.columns][:7] == [23, 25, 114, 3802, 17, 2950, 1184]
    assert [column.name for column in second.columns] == [*names, "extra"]
    assert second.id == first.id


def test_golden_inserts(golden: list[bytes]) -> None:
    first, second = map(pgoutput.read_relation, with_tag(golden, b"R"))
    inserts = with_tag(golden, b"I")
    assert [frame[pgoutput.INSERT_HEAD] == first.insert_head for frame in inserts] == [True] * 5 + [False]
    assert inserts[5][pgoutput.INSERT_HEAD] == second.insert_head
    read = compile_insert_reader(first, ["Odd Name", "raw", "doc", "docb", "label", "at", "feeling", "id"])
    assert read(inserts[0]) == (
        str(uuid.UUID("11111111-2222-3333-4444-555555555555")).encode(),
        b"\\xdeadbeef",
        b'{"a":  1}',
        b'{"a": 1}',
        "grüße".encode(),
        b"2024-02-29 12:00:00.5+00",
        b"fine",
        b"1",
    )
    assert [read(frame) for frame in inserts[1:4]] == [(None,) * 7 + (number,) for number in (b"2", b"3", b"4")]
    assert read(inserts[4])[2] == b'{"long" : "' + b"x" * 20000 + b'"}'
    assert compile_insert_reader(second, ["extra", "id"])(inserts[5]) == (b"7", b"6")


def test_golden_transactions(golden: list[bytes]) -> None:
    begins = [pgoutput.read_begin(frame) for frame in with_tag(golden, b"B")]
    commits = [pgoutput.read_commit(frame) for frame in with_tag(golden, b"C")]
    assert len(begins) == len(commits) >= 4, "14 sends transactions without events too"
    for (begin_lsn, commit_time_ms), (wal_end, commit_lsn, end_lsn) in zip(begins, commits, strict=True):
        assert begin_lsn == commit_lsn < end_lsn <= wal_end
        assert 1_700_000_000_000 < commit_time_ms < 2_500_000_000_000  # this century, in milliseconds


def test_begin_and_commit_of_hand_made_frames() -> None:
    assert pgoutput.read_begin(frames.begin(5, time_us=1_234_567)) == (5, 946_684_801_234)
    assert pgoutput.read_commit(frames.commit(5, 9, wal_end=12)) == (12, 5, 9)


@pytest.mark.parametrize(
    ("commit_lsn", "end_lsn", "wal_end"),
    [(5, 5, 9), (5, 4, 9), (5, 10, 9), (5, 2**63, 9)],
    ids=["empty", "backwards", "beyond what was sent", "garbage"],
)
def test_a_commit_that_cannot_be_is_refused(commit_lsn: int, end_lsn: int, wal_end: int) -> None:
    with pytest.raises(MalformedStream, match="claims to end at"):
        pgoutput.read_commit(frames.commit(commit_lsn, end_lsn, wal_end=wal_end))


@given(st.binary(max_size=120))
def test_arbitrary_bytes_give_a_value_or_the_one_error(data: bytes) -> None:
    frame = frames.xlog_data(data)
    for read in (
        pgoutput.read_begin,
        pgoutput.read_commit,
        pgoutput.read_relation,
        compile_insert_reader(TABLE, ["c", "a"]),
    ):
        try:
            read(frame)
        except MalformedStream:
            continue


values = st.lists(st.none() | st.binary(max_size=300), min_size=3, max_size=3)


@given(values)
def test_what_was_inserted_is_read(row: list[bytes | None]) -> None:
    frame = frames.insert(7, row)
    assert frame[pgoutput.INSERT_HEAD] == TABLE.insert_head
    assert compile_insert_reader(TABLE, ["c", "a"])(frame) == (row[2], row[0])


#: values of few lengths, some of which look like the head of another
lookalikes = st.none() | st.sampled_from([b"", b"n", b"t", b"tt", b"t\0\0\0\1t"])


@given(st.lists(st.lists(lookalikes, min_size=3, max_size=3), max_size=20))
def test_rows_of_one_length_may_be_laid_out_differently(rows: list[list[bytes | None]]) -> None:
    read = compile_insert_reader(TABLE, ["c", "a"])
    assert [read(frames.insert(7, row)) for row in rows] == [(row[2], row[0]) for row in rows]


@given(values, st.data())
def test_an_insert_cut_short_or_with_something_behind_is_refused(row: list[bytes | None], data: st.DataObject) -> None:
    frame = frames.insert(7, row)
    cut = data.draw(st.integers(33, len(frame) - 1))
    read = compile_insert_reader(TABLE, ["a"])
    read(frame)
    for wrong in (frame[:cut], frame + b"!"):
        with pytest.raises(MalformedStream):
            read(wrong)


@pytest.mark.parametrize("kind", [b"u", b"b", b"x"])
def test_a_value_of_unknown_kind_is_refused_by_name(kind: bytes) -> None:
    frame = frames.insert(7, [b"1", None, None]).replace(b"t", kind, 1)
    with pytest.raises(MalformedStream, match=r"public\.t: column a"):
        compile_insert_reader(TABLE, ["b"])(frame)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1), st.integers(0, 2**32 - 1)
    ),
    st.data(),
)
def test_relation(columns: dict[str, int], data: st.DataObject) -> None:
    frame = frames.relation(9, "söme", columns, namespace="app")
    relation = pgoutput.read_relation(frame)
    assert (relation.id, str(relation)) == (9, "app.söme")
    assert {column.name: column.type_oid for column in relation.columns} == columns
    cut = data.draw(st.integers(25, len(frame) - 1))
    with pytest.raises(MalformedStream):
        pgoutput.read_relation(frame[:cut])
    with pytest.raises(MalformedStream):
        pgoutput.read_relation(frame + b"!")
