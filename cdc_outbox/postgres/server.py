"""Which server a connection has reached, and whether two of ours have reached the same one.

Several hosts in a DSN, or a load balancer, may lead two connections apart: what one is told then says nothing of what
the other streams.
Source: PostgreSQL manual, "Streaming Replication Protocol" (IDENTIFY_SYSTEM), "Control Data Functions".
"""

from dataclasses import dataclass
from typing import Final

from cdc_outbox.errors import SourceUnavailable
from cdc_outbox.postgres.connection import Connection, translated
from cdc_outbox.wal.lsn import LSN

#: A standby writes no WAL of its own; its control file tells the timeline of what it replays.
TIMELINE: Final = (
    "CASE WHEN pg_is_in_recovery() THEN (SELECT timeline_id FROM pg_control_checkpoint())"
    " ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int END"
)


@dataclass(frozen=True, slots=True)
class Server:
    """A standby that was promoted is the same system on another timeline."""

    system_identifier: str
    timeline: int
    wal_end: LSN
    is_standby: bool


def check_same_server(connection: Connection, streamed: Server) -> None:
    """See that ``connection`` has reached the server that is streamed from. Raises SourceUnavailable: it may pass."""
    with translated("identifying the server"):
        row = connection.execute(
            f"SELECT system_identifier::text, {TIMELINE}, pg_is_in_recovery() FROM pg_control_system()"  # noqa: S608
        ).fetchone()
    expected = (streamed.system_identifier, streamed.timeline, streamed.is_standby)
    if row != expected:
        raise SourceUnavailable(
            f"postgres.dsn leads to two servers: {_name(*expected)} for the stream, {_name(*(row or ()))} for the rest",
            hint="let postgres.dsn lead to one server, for example with target_session_attrs=primary",
        )


def _name(system_identifier: str = "", timeline: int = 0, is_standby: bool = False) -> str:  # noqa: FBT001, FBT002
    return f"system {system_identifier}, timeline {timeline}{', a standby' if is_standby else ''}"
