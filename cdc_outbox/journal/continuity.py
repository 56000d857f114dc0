"""Continuity: detects that the slot is not the one that was confirmed to, so that a gap is told and not skipped.

A slot that was dropped and created again begins where it was created, and nothing in the protocol tells. So the relay
notes in cdc_outbox.confirmation, before it confirms beyond what is noted, up to where it may; and with it how many
transactions the server had decoded for the slot. Two signs of a gap follow, and either is enough:

- the slot stands beyond what was noted: somebody else moved it, or created it there;
- the server's count for the slot is smaller than it was: the slot is a new one. This shows even a slot created again
  right after a crash of the relay. It proves nothing after a crash of the server or a failover, where counts are reset;
  `counted_since` says so.

The note serves a second purpose: a crash of the server puts the slot back to its last checkpoint, and reading then
starts where the note says that all before is confirmed.

And a server can be another one (restored, cloned) or have lost what it had sent (restored, failed over too early).
Source: PostgreSQL manual, "pg_stat_replication_slots" (total_txns), "Streaming Replication Protocol" (IDENTIFY_SYSTEM).
"""

from typing import Final

import psycopg
from psycopg import sql

from cdc_outbox.errors import OperatorNeeded, SourceUnavailable
from cdc_outbox.postgres.connection import Connection, explain, translated
from cdc_outbox.postgres.server import TIMELINE, Server
from cdc_outbox.wal.lsn import LSN

#: How far ahead of what is confirmed the limit is noted: one small write for so many bytes of WAL.
HEADROOM_BYTES: Final = 16 * 1024 * 1024

#: What the server has counted for a slot, and what would reset that count: another history of the server
#: (timeline), a crash (it resets all statistics, the archiver's too), or somebody's reset.
_COUNTED: Final = f"""
    SELECT coalesce(counter.total_txns, 0) AS transactions,
           concat_ws('/', {TIMELINE}, extract(epoch FROM archiver.stats_reset),
                     coalesce(extract(epoch FROM counter.stats_reset), 0)) AS since
      FROM pg_stat_archiver AS archiver LEFT JOIN pg_stat_replication_slots AS counter ON counter.slot_name = {{slot}}
"""  # noqa: S608 - a constant

#: Asked of the server's memory, not of a snapshot.
_IS_OURS: Final = sql.SQL("(SELECT active_pid FROM pg_replication_slots WHERE slot_name = {slot}) = {pid}")


class Continuity:
    """What one relay knows of its slot, over all its sessions."""

    def __init__(self, slot: str) -> None:
        self._slot = slot
        self._server: Server | None = None
        #: what this process has confirmed last
        self._confirmed = LSN(0)
        self._limit = LSN(0)
        #: the note that this process has written last: what it says is confirmed, when, on which timeline
        self._last_note: tuple[LSN, str, int] | None = None
        #: what is confirmed since that note, or by it
        self._confirmed_since = LSN(0)
        #: where to start reading: all before is acknowledged, wherever a crash has put the slot back to; 0: not known
        self.start_lsn = LSN(0)
        #: whether schema cdc_outbox is there, and ours to read; if not, nothing is noticed
        self.is_noted = False

    @property
    def system_identifier(self) -> str:
        assert self._server is not None  # `check` comes first
        return self._server.system_identifier

    @property
    def limit(self) -> LSN:
        """Up to here it may be confirmed without another `note`."""
        return self._limit

    def check(self, connection: Connection, server: Server) -> None:
        """See, before ``server`` is streamed from, that the slot goes on where it was left, and from where on to read.

        Raises OperatorNeeded for a gap or another server.
        """
        if self._server and self._server.system_identifier != server.system_identifier:
            raise self._another_server(self._server.system_identifier, server)
        if server.wal_end < self._confirmed:
            raise OperatorNeeded(
                f"the server's WAL ends at {server.wal_end}, but {self._confirmed} was confirmed: it has lost what it "
                f"had sent (restored from an older state, or failed over to a standby that lagged)",
                hint="Kafka has events that this database has not; decide what to do about them, then start the relay",
            )
        self._server = server
        self._limit = self.start_lsn = LSN(0)
        self._compare_with_what_was_noted(connection, server)

    def note(self, connection: Connection, confirmed: LSN, *, limit: LSN, walsender_pid: int) -> None:
        """To be called before anything beyond ``self.limit`` is confirmed. Durable when it returns.

        Raises SourceUnavailable if the slot is no longer ``walsender_pid``'s: a relay that was frozen for long must not
        overwrite what its successor has noted. That is looked at while the note is locked.
        """
        assert self._server is not None  # `check` comes first
        with translated("noting what is confirmed in cdc_outbox.confirmation"):
            noted = connection.execute(
                sql.SQL(
                    """
                    INSERT INTO cdc_outbox.confirmation
                           (slot, system_identifier, confirmed_lsn, limit_lsn, decoded_transactions, counted_since)
                    SELECT {slot}, {system}, {confirmed}::pg_lsn, {limit}::pg_lsn, transactions, since
                      FROM ({counted}) AS counted
                     WHERE {is_ours}
                        ON CONFLICT (slot) DO UPDATE
                       SET (system_identifier, confirmed_lsn, limit_lsn, decoded_transactions, counted_since, noted_at)
                         = (excluded.system_identifier,
                            CASE WHEN confirmation.system_identifier = excluded.system_identifier
                                 THEN greatest(excluded.confirmed_lsn, confirmation.confirmed_lsn)
                                 ELSE excluded.confirmed_lsn END,
                            excluded.limit_lsn, excluded.decoded_transactions, excluded.counted_since, now())
                     WHERE {is_ours}
                 RETURNING confirmed_lsn::text, noted_at::text
                    """
                ).format(
                    slot=self._slot,
                    system=self._server.system_identifier,
                    confirmed=str(confirmed),
                    limit=str(limit),
                    counted=_counted(self._slot),
                    is_ours=_IS_OURS.format(slot=self._slot, pid=walsender_pid),
                )
            ).fetchone()
        if noted is None:
            raise SourceUnavailable(f"replication slot {self._slot!r} is not read by this relay any more")
        self._limit = limit
        self._last_note = LSN.parse(noted[0]), noted[1], self._server.timeline
        self._confirmed_since = confirmed

    def confirmed(self, lsn: LSN) -> None:
        """Remember what the server is told: all of it must still be there when it is connected to again."""
        self._confirmed = max(self._confirmed, lsn)
        self._confirmed_since = max(self._confirmed_since, lsn)

    def _compare_with_what_was_noted(self, connection: Connection, server: Server) -> None:
        # Only a slot that nobody streams from stands still; its leader may be confirming at this very moment.
        try:
            row = connection.execute(
                sql.SQL(
                    """
                    SELECT noted.system_identifier, noted.confirmed_lsn::text, noted.noted_at::text,
                           slot.confirmed_flush_lsn::text, slot.confirmed_flush_lsn > noted.limit_lsn,
                           counted.since = noted.counted_since AND counted.transactions < noted.decoded_transactions
                      FROM cdc_outbox.confirmation AS noted
                      JOIN pg_replication_slots AS slot ON slot.slot_name = noted.slot,
                           ({counted}) AS counted
                     WHERE noted.slot = {slot} AND slot.active_pid IS NULL
                    """
                ).format(slot=self._slot, counted=_counted(self._slot))
            ).fetchone()
        except (psycopg.errors.UndefinedTable, psycopg.errors.InsufficientPrivilege):
            self.is_noted = False
            return
        except psycopg.Error as error:
            raise explain(error, "reading cdc_outbox.confirmation") from error
        self.is_noted = True
        if row is None:
            return
        system_identifier, confirmed, noted_at, stands_at, is_beyond, is_new = row
        if system_identifier != server.system_identifier:
            raise self._another_server(system_identifier, server)
        if is_beyond or is_new:
            how = "was created again" if is_new else "stands beyond what was confirmed"
            raise OperatorNeeded(
                f"replication slot {self._slot!r} {how}: it begins at {stands_at}, but events are confirmed only up to "
                f"{confirmed} (as of {noted_at}); what was committed between is not in it",
                hint=f"publish what is missing, then accept the gap: {self._forget()}",
            )
        self.start_lsn = self._acknowledged(LSN.parse(confirmed), noted_at, server)

    def _acknowledged(self, noted: LSN, noted_at: str, server: Server) -> LSN:
        """Up to where all is acknowledged by Kafka, or kept; 0 if that is not known.

        What this process confirmed after its last note counts too, if the server has lost nothing and nobody else has
        relayed meanwhile: the note is still that one, on the same timeline.
        """
        is_ours = self._last_note == (noted, noted_at, server.timeline)
        lsn = max(noted, self._confirmed_since) if is_ours else noted
        return lsn if lsn <= server.wal_end else LSN(0)

    def _another_server(self, before: str, now: Server) -> OperatorNeeded:
        return OperatorNeeded(
            f"this is another server: its system identifier is {now.system_identifier}, slot {self._slot!r} was "
            f"confirmed on {before}; the database was restored or cloned",
            hint=f"see that no other relay publishes the same events, then accept it: {self._forget()}",
        )

    def _forget(self) -> str:
        statement = sql.SQL("DELETE FROM cdc_outbox.confirmation WHERE slot = {}").format(self._slot)
        return f"{statement.as_string()}, and start the relay again"


def begin_sql(slot: str) -> sql.Composed:
    """The note of a slot that has just been made: losing it before a relay has run is a gap, too.

    What was noted of a slot of this name before stays: a relay will say that this one does not go on from there.
    """
    return sql.SQL(
        """INSERT INTO cdc_outbox.confirmation
       (slot, system_identifier, confirmed_lsn, limit_lsn, decoded_transactions, counted_since)
SELECT slot_name, system_identifier::text, confirmed_flush_lsn, confirmed_flush_lsn, transactions, since
  FROM pg_replication_slots, pg_control_system(), ({counted}) AS counted WHERE slot_name = {slot}
    ON CONFLICT (slot) DO NOTHING;"""
    ).format(slot=slot, counted=_counted(slot))


def _counted(slot: str) -> sql.Composed:
    return sql.SQL(_COUNTED).format(slot=slot)
