"""Policies as the relay remembers them: which one governs from where in the log. Table cdc_outbox.policy.

Reading policies loads pydantic's models and time zones: only who has one pays for that, at the start.
"""

from typing import TYPE_CHECKING

from cdc_outbox.errors import OperatorNeeded
from cdc_outbox.journal import outcomes
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


def may_govern(connection: Connection) -> bool:
    """Whether there can be policies in this database, for a role that may not read them."""
    with translated("looking for cdc_outbox.policy"):
        query = "SELECT FROM pg_class WHERE relname = 'policy' AND relnamespace = to_regnamespace('cdc_outbox')"
        return connection.execute(query).rowcount == 1


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
    except Exception as error:  # noqa: BLE001 - it would come again at each start, and end the relay each time
        return f"it cannot be read: {type(error).__name__}: {error}"
    if missing := policy.beyond_this_version:
        return missing
    return Gates(policy)


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
        outcomes.record(connection, {request.id: None}, "activated")
