"""Policies as the relay remembers them: which one governs from where in the log. Table cdc_outbox.policy.

Reading policies loads pydantic's models and time zones: only who has one pays for that, at the start.
"""

from typing import TYPE_CHECKING

from cdc_outbox.errors import OperatorNeeded
from cdc_outbox.postgres.connection import Connection, translated
from cdc_outbox.relay.requests import PolicyRequest
from cdc_outbox.wal.lsn import LSN
from cdc_outbox.wal.position import Position

if TYPE_CHECKING:
    from cdc_outbox.relay.policy.gate import Gates

#: Behind a restore, or pg_upgrade, the log begins anew under another identifier: what governed before goes on to.
_IN_FORCE = """
    SELECT source FROM cdc_outbox.policy
     WHERE slot = %(slot)s AND (system_identifier <> %(system)s OR commit_lsn < %(before)s::pg_lsn)
     ORDER BY (system_identifier = %(system)s) DESC,
              CASE WHEN system_identifier = %(system)s THEN commit_lsn END DESC,
              CASE WHEN system_identifier = %(system)s THEN ordinal END DESC, id DESC
     LIMIT 1
"""


def in_force(connection: Connection, system_identifier: str, slot: str, *, before: LSN) -> "Gates | None":
    """Of the policy that governs what commits at ``before`` and later, until another one comes; None if there is none.

    Raises OperatorNeeded if it cannot be read any more: nothing is published then.
    """
    with translated("reading cdc_outbox.policy"):
        row = connection.execute(
            _IN_FORCE, {"slot": slot, "system": system_identifier, "before": str(before)}
        ).fetchone()
    if row is None:
        return None
    gates = compiled(row[0].encode())
    if isinstance(gates, str):
        raise OperatorNeeded(
            f"the policy in force cannot be read: {gates}",
            hint="run the version that it was activated with, or let `cdc-outbox policy log` show what it is",
        )
    return gates


def compiled(source: bytes) -> "Gates | str":
    """Or what is wrong with it."""
    from cdc_outbox.relay.policy.document import PolicyError, read_policy
    from cdc_outbox.relay.policy.gate import Gates

    try:
        policy = read_policy(source)
    except PolicyError as error:
        return f"line {error.mistakes[0]}" + (f", and {more} more" if (more := len(error.mistakes) - 1) else "")
    if missing := policy.beyond_this_version:
        return missing
    return Gates(policy)


def outcome_of(connection: Connection, request_id: int) -> str | None:
    """What came of a request that was carried out before a crash; None if it was not."""
    with translated("reading cdc_outbox.outcome"):
        row = connection.execute("SELECT result FROM cdc_outbox.outcome WHERE request_id = %s", [request_id]).fetchone()
    return row[0] if row else None


def activated(
    connection: Connection, system_identifier: str, request: PolicyRequest, position: Position, sha256: bytes
) -> None:
    """Durable when it returns."""
    with translated("recording a policy"), connection.transaction():
        connection.execute(
            "INSERT INTO cdc_outbox.policy (system_identifier, slot, commit_lsn, ordinal, sha256, source, principal,"
            " reason) VALUES (%s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
            [
                system_identifier,
                request.slot,
                str(LSN(position.commit_lsn)),
                position.ordinal,
                sha256,
                request.source.decode(),
                request.principal,
                request.reason,
            ],
        )
        connection.execute(
            "INSERT INTO cdc_outbox.outcome (request_id, result) VALUES (%s, 'activated') ON CONFLICT DO NOTHING",
            [request.id],
        )


def refused(connection: Connection, request_id: int, detail: str) -> None:
    with translated("recording that a policy was refused"):
        connection.execute(
            "INSERT INTO cdc_outbox.outcome (request_id, result, detail) VALUES (%s, 'refused', %s)"
            " ON CONFLICT DO NOTHING",
            [request_id, detail],
        )
