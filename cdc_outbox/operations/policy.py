"""The policy between commit and dispatch, for those who write it and put it in force.

A policy comes into force by a request that travels through the log (sql/0009_policy.sql).
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, LiteralString

import psycopg
from psycopg.rows import class_row

from cdc_outbox.errors import CdcOutboxError, ConfigurationError
from cdc_outbox.operations.findings import Finding
from cdc_outbox.operations.requests import check_heard
from cdc_outbox.postgres.connection import POLICY_ADMIN, READER, Connection, granting, translated
from cdc_outbox.relay.policy.document import MAX_BYTES, Mistake, PolicyError, read_policy
from cdc_outbox.relay.policy.lint import warnings_of


@dataclass(frozen=True, slots=True)
class Activation:
    """A policy that somebody asked for. ``state``: in force, replaced, refused, requested."""

    at: datetime
    principal: str
    reason: str
    state: str
    #: why it was refused
    detail: str
    #: of the source, in hex; None unless it was activated
    sha256: str | None
    #: commit LSN of the transaction behind which it governs
    lsn: str | None
    source: str | None


_ACTIVATED: Final = """
    SELECT at, principal, reason,
           CASE WHEN id = max(id) OVER () THEN 'in force' ELSE 'replaced' END AS state, '' AS detail,
           encode(sha256, 'hex') AS sha256, commit_lsn::text AS lsn, source
      FROM cdc_outbox.policy WHERE slot = %(slot)s
"""
#: Whose request may be gone by now; and requests that were not carried out, or refused.
_ALL: Final = f"""
    {_ACTIVATED}
     UNION ALL
    SELECT request.at, principal, reason, coalesce(result, 'requested'), coalesce(detail, ''), NULL, NULL, NULL
      FROM cdc_outbox.request LEFT JOIN cdc_outbox.outcome ON request_id = request.id
     WHERE slot = %(slot)s AND kind = 'policy' AND result IS DISTINCT FROM 'activated'
     ORDER BY at DESC
"""  # noqa: S608 - of our own text


@dataclass(frozen=True, slots=True)
class Checked:
    """What is known of a policy file. It is in order if there are no mistakes."""

    file: str
    sha256: str
    rules: int
    mistakes: list[Mistake]
    warnings: list[Mistake]


def check(file: Path, source: bytes) -> Checked:
    sha256 = hashlib.sha256(source).hexdigest()
    try:
        policy = read_policy(source)
    except PolicyError as error:
        return Checked(str(file), sha256, 0, error.mistakes, [])
    return Checked(str(file), sha256, len(policy.rules), [], warnings_of(policy))


def read_source(file: Path) -> bytes:
    """Not more than one byte too much. Raises ConfigurationError."""
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"policy {file} cannot be read: {(error.strerror or str(error)).lower()}") from error


def request_activation(connection: Connection, publication: str, slot: str, source: bytes, reason: str) -> int:
    """Ask the relay of ``slot`` to judge by it; the request's id. Raises OperatorNeeded if it would not hear of it."""
    check_heard(connection, publication)
    with translated("asking for a policy", granting(connection, POLICY_ADMIN)):
        row = connection.execute(
            "INSERT INTO cdc_outbox.request (slot, kind, body, reason) VALUES (%s, 'policy', %s, %s) RETURNING id",
            [slot, source.decode(), reason],
        ).fetchone()
    assert row is not None
    return int(row[0])


def activations(connection: Connection, slot: str) -> list[Activation]:
    """Those that were asked for, the latest first."""
    return _select(connection, _ALL, slot)


def in_force(connection: Connection, slot: str) -> Activation | None:
    """None, too, if the schema is not installed, or is older than policies."""
    found = _select(connection, f"{_ACTIVATED} ORDER BY id DESC LIMIT 1", slot)
    return found[0] if found else None


def _select(connection: Connection, query: LiteralString, slot: str) -> list[Activation]:
    cursor = connection.cursor(row_factory=class_row(Activation))
    with translated("reading cdc_outbox.policy", granting(connection, READER)):
        try:
            return cursor.execute(query, {"slot": slot}).fetchall()
        except psycopg.errors.UndefinedTable:
            return []


def _governed_slots(connection: Connection) -> list[str]:
    with translated("reading cdc_outbox.policy", granting(connection, READER)):
        try:
            rows = connection.execute("SELECT DISTINCT slot FROM cdc_outbox.policy ORDER BY slot").fetchall()
        except psycopg.errors.UndefinedTable:
            return []
    return [slot for (slot,) in rows]


def finding(connection: Connection, slot: str) -> Finding:
    """For `doctor`: what governs the relay of ``slot``. A policy is that of one slot: another one's relay has none."""
    try:
        governs, governed = in_force(connection, slot), _governed_slots(connection)
    except CdcOutboxError as error:  # the relay's schema is not there, or not ours to read: another check says so
        return Finding("policy", "warning", f"cannot be told: {error.message}", error.hint)
    if governs:
        return Finding("policy", "ok", f"{(governs.sha256 or '')[:12]} is in force since {governs.at:%Y-%m-%d %H:%M}")
    if governed:
        others = ", ".join(map(repr, governed))
        hint = "activate one with this configuration: cdc-outbox policy activate"
        return Finding("policy", "warning", f"none governs slot {slot!r}, but one does {others}", hint)
    return Finding("policy", "ok", "none is in force: every event may go to Kafka")
