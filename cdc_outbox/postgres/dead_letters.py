"""The table cdc_outbox.dead_letter: what the relay puts into it, and what an operator does about it.

Over any connection that has the rights (sql/0005_dead_letters.sql). A dead letter is *open* until somebody asks for a
redrive (*redriving*), which ends *redriven* or, refused once more, *open* again; or until it is *discarded*.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from cdc_outbox.errors import ConfigurationError, OperatorNeeded
from cdc_outbox.postgres.connection import MIGRATE_HINT, Connection, translated
from cdc_outbox.postgres.lsn import LSN

Row = dict[str, Any]

#: Without what an event says, in the order a person would read them.
_SUMMARY: Final = (
    "id, state, created_at, reason, detail, attempts, event_id, aggregate_type, aggregate_id, event_type, topic, "
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


def put(connection: Connection, columns: Mapping[str, Any]) -> bool:
    """Keep an event; durable when it returns. False if it is there already: its identity is unique."""
    with translated("writing to cdc_outbox.dead_letter"):
        statement = sql.SQL(
            "INSERT INTO cdc_outbox.dead_letter ({}) VALUES ({})"
            " ON CONFLICT (system_identifier, slot, commit_lsn, ordinal) DO NOTHING"
        ).format(
            sql.SQL(", ").join(map(sql.Identifier, columns)),
            sql.SQL(", ").join(map(sql.Placeholder, columns)),
        )
        return connection.execute(statement, columns).rowcount == 1


def settled_since(connection: Connection, system_identifier: str, slot: str, lsn: LSN) -> list[tuple[LSN, int]]:
    """The identities (commit LSN, ordinal) of dead letters that the slot may send once more."""
    with translated("reading cdc_outbox.dead_letter"):
        rows = connection.execute(
            "SELECT commit_lsn::text, ordinal FROM cdc_outbox.dead_letter"
            " WHERE system_identifier = %s AND slot = %s AND commit_lsn >= %s::pg_lsn",
            [system_identifier, slot, str(lsn)],
        ).fetchall()
    return [(LSN.parse(commit_lsn), ordinal) for commit_lsn, ordinal in rows]


def get(connection: Connection, dead_letter_id: int) -> Row | None:
    """One dead letter, payload and all."""
    rows = _select(connection, f"{_SUMMARY}, key, headers, payload", "WHERE id = %s", [dead_letter_id])
    return rows[0] if rows else None


def find(connection: Connection, wanted: Filter) -> list[Row]:
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
        clauses.append("state IN ('open', 'redriving')")
    rest = f"WHERE {' AND '.join(clauses) or 'true'} ORDER BY committed_at, commit_lsn, ordinal"
    return _select(connection, _SUMMARY, rest, [value for _, value in given])


def count_waiting(connection: Connection) -> int | None:
    """Dead letters that somebody must decide about; None if the schema is not installed."""
    with translated("reading cdc_outbox.dead_letter"):
        try:
            row = connection.execute(
                "SELECT count(id) FROM cdc_outbox.dead_letter WHERE state IN ('open', 'redriving')"
            ).fetchone()
        except psycopg.errors.UndefinedTable:
            return None
    return row[0] if row else None


def request_redrive(
    connection: Connection, publication: str, dead_letter_id: int, *, topic: str | None, key: str | None
) -> None:
    """Ask the running relay to publish it again.

    Raises OperatorNeeded if the relay would not hear of it, ConfigurationError if the dead letter is not open, or has
    no topic or key and none is given.
    """
    _check_published(connection, publication)
    with connection.transaction():
        letter = _lock_open(connection, dead_letter_id)
        for name, given in (("topic", topic), ("key", key)):
            if letter[name] is None and given is None:
                raise ConfigurationError(f"dead letter {dead_letter_id} has no {name}", hint=f"give one with --{name}")
        with translated("asking for a redrive"):
            _change_state(connection, [dead_letter_id], "redriving")
            connection.execute(
                "INSERT INTO cdc_outbox.redrive_request (dead_letter_id, topic, key) VALUES (%s, %s, %s)",
                [dead_letter_id, topic, key],
            )


def discard(connection: Connection, dead_letter_id: int, note: str) -> None:
    """Nothing more is to be done about it; it is kept, with ``note``. Raises ConfigurationError if it is not open."""
    with connection.transaction():
        _lock_open(connection, dead_letter_id)
        with translated("discarding a dead letter"):
            _change_state(connection, [dead_letter_id], "discarded", note=note)


def redriven(connection: Connection, dead_letter_ids: Sequence[int]) -> None:
    """Kafka has acknowledged them."""
    with translated("recording a redrive"):
        _change_state(connection, dead_letter_ids, "redriven")


def refused_again(connection: Connection, dead_letter_id: int, *, reason: str, detail: str) -> None:
    with translated("recording a refused redrive"):
        connection.execute(
            "UPDATE cdc_outbox.dead_letter SET state = 'open', attempts = attempts + 1, reason = %s, detail = %s,"
            " state_changed_at = now(), state_changed_by = current_user WHERE id = %s AND state = 'redriving'",
            [reason, detail, dead_letter_id],
        )


def unknown(dead_letter_id: int) -> ConfigurationError:
    return ConfigurationError(
        f"there is no dead letter {dead_letter_id}", hint="see: cdc-outbox dead-letters list --all"
    )


def _check_published(connection: Connection, publication: str) -> None:
    with translated("looking at the publication"):
        listed = connection.execute(
            "SELECT FROM pg_publication_tables"
            " WHERE pubname = %s AND schemaname = 'cdc_outbox' AND tablename = 'redrive_request'",
            [publication],
        ).rowcount
    if not listed:
        raise OperatorNeeded(
            f"publication {publication!r} does not list cdc_outbox.redrive_request: the relay would not hear of it",
            hint=MIGRATE_HINT,
        )


def _lock_open(connection: Connection, dead_letter_id: int) -> Row:
    rows = _select(connection, "state, topic, key", "WHERE id = %s FOR UPDATE", [dead_letter_id])
    if not rows:
        raise unknown(dead_letter_id)
    letter = rows[0]
    if letter["state"] != "open":
        raise ConfigurationError(
            f"dead letter {dead_letter_id} is {letter['state']}, not open",
            hint=f"see: cdc-outbox dead-letters show {dead_letter_id}",
        )
    return letter


def _change_state(connection: Connection, ids: Sequence[int], state: str, *, note: str | None = None) -> None:
    connection.execute(
        "UPDATE cdc_outbox.dead_letter SET state = %s, note = %s, state_changed_at = now(),"
        " state_changed_by = current_user WHERE id = ANY(%s)",
        [state, note, list(ids)],
    )


def _select(
    connection: Connection, columns: LiteralString, rest: LiteralString, parameters: Sequence[Any]
) -> list[Row]:
    with translated("reading cdc_outbox.dead_letter"):
        cursor = connection.cursor(row_factory=dict_row)
        return cursor.execute(f"SELECT {columns} FROM cdc_outbox.dead_letter {rest}", parameters).fetchall()  # noqa: S608
