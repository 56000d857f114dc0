"""Events that the policy keeps inside, as an operator sees them (sql/0003_parked.sql)."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final, LiteralString, TypeVar

from psycopg.rows import class_row

from cdc_outbox.errors import ConfigurationError
from cdc_outbox.postgres.connection import READER, Connection, granting, translated

STATES: Final = ("denied",)


@dataclass(frozen=True, slots=True)
class Hold:
    """Without what the event says."""

    id: int
    state: str
    created_at: datetime
    rule: str
    #: rule, default, or error: the rule could not be evaluated
    reason: str
    detail: str
    event_id: str | None
    aggregate_type: str | None
    aggregate_id: str | None
    event_type: str | None
    topic: str | None
    event_sha256: str
    rule_sha256: str
    policy_sha256: str
    commit_lsn: str
    ordinal: int
    committed_at: datetime
    slot: str


@dataclass(frozen=True, slots=True)
class WholeHold(Hold):
    key: bytes | None
    headers: list[tuple[str, str | None]] | None
    #: None, too, where only its SHA-256 was kept
    payload: bytes | None


AnyHold = TypeVar("AnyHold", bound=Hold)

_SUMMARY: Final = (
    "id, state, created_at, rule, reason, detail, event_id, aggregate_type, aggregate_id, event_type, topic,"
    " encode(event_sha256, 'hex') AS event_sha256, encode(rule_sha256, 'hex') AS rule_sha256,"
    " encode(policy_sha256, 'hex') AS policy_sha256, commit_lsn::text, ordinal, committed_at, slot"
)


def find(connection: Connection, *, state: str, limit: int) -> list[Hold]:
    """The latest ``limit`` in that state, the latest first."""
    rest: LiteralString = "WHERE state = %s ORDER BY id DESC LIMIT %s"
    return _select(Hold, connection, _SUMMARY, rest, [state, limit])


def get(connection: Connection, hold_id: int) -> WholeHold:
    """One, payload and all. Raises ConfigurationError if there is none."""
    rest: LiteralString = "WHERE id = %s AND rule IS NOT NULL"
    whole: LiteralString = f"{_SUMMARY}, key, headers, payload"
    holds = _select(WholeHold, connection, whole, rest, [hold_id], "SELECT ON cdc_outbox.parked")
    if not holds:
        raise ConfigurationError(f"there is no hold {hold_id}", hint="see: cdc-outbox holds list --state denied")
    return holds[0]


def _select(
    kind: type[AnyHold], connection: Connection, columns: LiteralString, rest: LiteralString, values: list[object],
    *needed: str,
) -> list[AnyHold]:  # fmt: skip
    """``needed`` beside what a reader may see."""
    with translated("reading cdc_outbox.parked", granting(connection, READER, *needed)):
        cursor = connection.cursor(row_factory=class_row(kind))
        return cursor.execute(f"SELECT {columns} FROM cdc_outbox.parked {rest}", values).fetchall()  # noqa: S608
