"""Dead letters, as an operator sees them and decides about them.

Over any connection that has the rights (sql/0003_parked.sql). A dead letter is *open* (state dead) until it is
*redriven* or *discarded*. An open one that somebody wants to be redriven, without an outcome yet, is shown as
*redriving*; it can be asked for again all the same: a request may be lost with its slot.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, LiteralString, TypeVar

import psycopg
from psycopg.rows import class_row

from cdc_outbox.errors import ConfigurationError
from cdc_outbox.operations.requests import check_heard
from cdc_outbox.postgres.connection import READER, Connection, granting, translated


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Without what the event says."""

    id: int
    state: str
    created_at: datetime
    reason: str
    detail: str
    attempts: int
    event_id: str | None
    aggregate_type: str | None
    aggregate_id: str | None
    event_type: str | None
    topic: str | None
    commit_lsn: str
    ordinal: int
    committed_at: datetime
    slot: str
    state_changed_at: datetime
    state_changed_by: str
    note: str | None


@dataclass(frozen=True, slots=True)
class WholeDeadLetter(DeadLetter):
    key: bytes | None
    headers: list[tuple[str, str | None]] | None
    payload: bytes | None


@dataclass(frozen=True, slots=True)
class _Open:
    """What a decision needs to know of one."""

    state: str
    slot: str
    topic: str | None
    key: bytes | None


Letter = TypeVar("Letter")

#: As people see it.
_STATE: Final = """
    CASE WHEN letter.state <> 'dead' THEN letter.state
         WHEN EXISTS (
              SELECT FROM cdc_outbox.request AS request
               WHERE request.parked_id = letter.id
                 AND NOT EXISTS (SELECT FROM cdc_outbox.outcome WHERE request_id = request.id))
         THEN 'redriving' ELSE 'open' END AS state
"""
#: What a decision changes; who may change more could make another event of it.
_DECIDED: Final = ("state", "note", "state_changed_at", "state_changed_by")
_READ_EVENTS: Final = "SELECT ON cdc_outbox.parked"
#: Without what an event says, in the order a person would read them.
_SUMMARY: Final = (
    f"id, {_STATE}, created_at, reason, detail, attempts, event_id, aggregate_type, aggregate_id, event_type, topic, "
    "commit_lsn::text, ordinal, committed_at, slot, state_changed_at, state_changed_by, note"
)


@dataclass(frozen=True, slots=True)
class Filter:
    """Which dead letters: all that is given must hold."""

    aggregate_id: str | None = None
    event_type: str | None = None
    reason: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    #: those too about which all is done
    settled_too: bool = False


def get(connection: Connection, dead_letter_id: int) -> WholeDeadLetter:
    """One dead letter, payload and all. Raises ConfigurationError if there is none."""
    return _only(WholeDeadLetter, connection, f"{_SUMMARY}, key, headers, payload", dead_letter_id)


def _only(kind: type[Letter], connection: Connection, columns: LiteralString, dead_letter_id: int) -> Letter:
    only = "WHERE id = %s AND state IN ('dead', 'redriven', 'discarded')"
    letters = _select(kind, connection, columns, only, [dead_letter_id], _READ_EVENTS)
    if not letters:
        raise ConfigurationError(
            f"there is no dead letter {dead_letter_id}", hint="see: cdc-outbox dead-letters list --all"
        )
    return letters[0]


def find(connection: Connection, wanted: Filter) -> list[DeadLetter]:
    """Summaries, in the order of their commits."""
    conditions: list[tuple[LiteralString, Any]] = [
        ("aggregate_id = %s", wanted.aggregate_id),
        ("event_type = %s", wanted.event_type),
        ("reason ILIKE %s", wanted.reason),
        ("created_at >= %s", wanted.since),
        ("created_at < %s", wanted.until),
    ]
    given = [(condition, value) for condition, value in conditions if value is not None]
    clauses = [condition for condition, _ in given]
    if not wanted.settled_too:
        clauses.append("state = 'dead'")
    clauses.append("state IN ('dead', 'redriven', 'discarded')")
    rest = f"WHERE {' AND '.join(clauses)} ORDER BY committed_at, commit_lsn, ordinal"
    return _select(DeadLetter, connection, _SUMMARY, rest, [value for _, value in given])


def count_waiting(connection: Connection) -> int | None:
    """Dead letters that somebody must decide about; None if the schema is not installed."""
    with translated("reading cdc_outbox.parked", granting(connection, READER)):
        try:
            row = connection.execute("SELECT count(id) FROM cdc_outbox.parked WHERE state = 'dead'").fetchone()
        except psycopg.errors.UndefinedTable:
            return None
    return row[0] if row else None


def request_redrives(
    connection: Connection,
    publication: str,
    slot: str,
    dead_letter_ids: Iterable[int],
    *,
    topic: str | None,
    key: str | None,
) -> dict[int, int]:
    """Ask the relay of ``slot`` to publish them again, all or none; the requests' ids, by dead letter.

    Touches nothing that the relay writes to. Raises OperatorNeeded if the relay would not hear of it,
    ConfigurationError if one is another relay's, if all is done about it, or it has no topic or key and none is given.
    """
    check_heard(connection, publication)
    with connection.transaction():
        return {
            each: _request_redrive(connection, slot, each, topic=topic, key=key)
            for each in dict.fromkeys(dead_letter_ids)
        }


def _request_redrive(
    connection: Connection, slot: str, dead_letter_id: int, *, topic: str | None, key: str | None
) -> int:
    letter = _find_open(connection, dead_letter_id)
    _check_whose(connection, dead_letter_id, letter.slot, slot)
    for name, own, given in (("topic", letter.topic, topic), ("key", letter.key, key)):
        if own is None and given is None:
            raise ConfigurationError(f"dead letter {dead_letter_id} has no {name}", hint=f"give one with --{name}")
    with translated(
        "asking for a redrive",
        granting(connection, READER, _READ_EVENTS, "INSERT (slot, kind, parked_id, topic, key) ON cdc_outbox.request"),
    ):
        row = connection.execute(
            "INSERT INTO cdc_outbox.request (slot, kind, parked_id, topic, key) VALUES (%s, 'redrive', %s, %s, %s)"
            " RETURNING id",
            [slot, dead_letter_id, topic, key],
        ).fetchone()
    assert row is not None
    return int(row[0])


def discard(connection: Connection, dead_letter_id: int, note: str) -> None:
    """Nothing more is to be done about it; it is kept, with ``note``. Raises ConfigurationError if it is not open."""
    rights = granting(connection, READER, _READ_EVENTS, f"UPDATE ({', '.join(_DECIDED)}) ON cdc_outbox.parked")
    with connection.transaction(), translated("discarding a dead letter", rights):
        _find_open(connection, dead_letter_id)
        connection.execute(
            "UPDATE cdc_outbox.parked SET state = 'discarded', note = %s, state_changed_at = now(),"
            " state_changed_by = current_user WHERE id = %s",
            [note, dead_letter_id],
        )


def _check_whose(connection: Connection, dead_letter_id: int, theirs: str, ours: str) -> None:
    """Raises ConfigurationError if the dead letter is that of another slot, which is there."""
    if theirs == ours:
        return
    with translated("looking up slots"):
        is_there = connection.execute("SELECT FROM pg_replication_slots WHERE slot_name = %s", [theirs]).rowcount
    if is_there:
        raise ConfigurationError(
            f"dead letter {dead_letter_id} is that of slot {theirs!r}, and postgres.slot is {ours!r}",
            hint="use the configuration of that slot's relay",
        )


def _find_open(connection: Connection, dead_letter_id: int) -> _Open:
    letter = _only(_Open, connection, "state, slot, topic, key", dead_letter_id)
    if letter.state != "dead":
        raise ConfigurationError(
            f"dead letter {dead_letter_id} is {letter.state}, not open",
            hint=f"see: cdc-outbox dead-letters show {dead_letter_id}",
        )
    return letter


def _select(
    kind: type[Letter],
    connection: Connection,
    columns: LiteralString,
    rest: LiteralString,
    parameters: Sequence[Any],
    *needed: str,
) -> list[Letter]:
    """``needed`` beside what a reader may see."""
    with translated("reading cdc_outbox.parked", granting(connection, READER, *needed)):
        cursor = connection.cursor(row_factory=class_row(kind))
        return cursor.execute(f"SELECT {columns} FROM cdc_outbox.parked AS letter {rest}", parameters).fetchall()  # noqa: S608
