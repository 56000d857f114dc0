"""Settlement: which transactions, and so which rows of the outbox, are known to be published.

The relay takes a snapshot now and then, and where the log ends just after it. When that LSN is reached by what is
settled, the snapshot is noted in cdc_outbox.settled (sql/0007_settled.sql says what follows from a note, and what
does not). The slot's own confirmed position is never asked: anybody can move that by hand.
Source: PostgreSQL manual, "Transaction ID and Snapshot Information Functions".
"""

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from psycopg import sql

from cdc_outbox.config import ColumnsConfig
from cdc_outbox.postgres.catalog import Table
from cdc_outbox.postgres.connection import Connection, translated
from cdc_outbox.postgres.lsn import LSN

_TAKE_EVERY_SECONDS: Final = 1.0
_THIN_EVERY_SECONDS: Final = 600.0
#: More rows than this nobody reads; the count says how many there are.
_MOST_STUCK_SHOWN: Final = 100


@dataclass(frozen=True, slots=True)
class _Taken:
    snapshot: str
    lsn: LSN
    at: Any
    """By the server's clock."""


class Settlement:
    """What one session notes of its slot. Raises in every method what ``translated`` says."""

    def __init__(self, connection: Connection, slot: str, system_identifier: str, *, confirmed: LSN) -> None:
        """``confirmed`` is where the slot stands now, with nothing confirmed beyond it."""
        self._connection = connection
        self._slot = slot
        self._system_identifier = system_identifier
        self._since = self._since_when(confirmed)
        self._taken: _Taken | None = None
        #: events were settled since the last snapshot
        self._carried = True
        #: the last snapshot may have missed something: transactions were open in it, or one that came through the log
        #: just before (it is there a moment before a snapshot sees it as ended)
        self._look_again = False
        #: the oldest transaction that was open in it
        self._xmin = ""
        self._take_at = self._thin_at = time.monotonic()

    def carried(self) -> None:
        """Events were settled."""
        self._carried = True

    def take_if_due(self) -> bool:
        """Take a snapshot, at most once a second, to be noted when everything before it is settled.

        False if none was taken, or it tells no more than the last one.
        """
        if self._taken or not (self._carried or self._look_again) or time.monotonic() < self._take_at:
            return False
        self._take_at = time.monotonic() + _TAKE_EVERY_SECONDS
        with translated("taking a snapshot"):
            # One statement: its snapshot is taken before the function asks for the log's end.
            row = self._connection.execute(
                "SELECT snapshot::text, pg_current_wal_insert_lsn()::text, clock_timestamp(),"
                " pg_snapshot_xmin(snapshot)::text, pg_snapshot_xmin(snapshot) < pg_snapshot_xmax(snapshot)"
                " FROM pg_current_snapshot() AS snapshot"
            ).fetchone()
        assert row is not None
        snapshot, lsn, at, xmin, some_are_open = row
        self._look_again = some_are_open or self._carried
        if not self._carried and xmin == self._xmin:
            return False
        self._taken = _Taken(snapshot, LSN.parse(lsn), at)
        self._carried, self._xmin = False, xmin
        return True

    def settled(self, lsn: LSN) -> None:
        """Everything up to ``lsn`` is settled: note the snapshot that waited for it."""
        if not self._taken or lsn < self._taken.lsn:
            return
        self._note(self._taken)
        self._taken = None
        if time.monotonic() >= self._thin_at:
            self._thin_at = time.monotonic() + _THIN_EVERY_SECONDS
            self._thin()

    def _since_when(self, confirmed: LSN) -> str:
        """The snapshot by which the slot had begun, noted now if nobody has.

        It goes on from the last note as long as Continuity knows of the slot. Of a slot it does not know, it began
        where it stands: `migrate` notes that when it makes one.
        """
        with translated("reading cdc_outbox.settled"):
            row = self._connection.execute(
                """
                SELECT since::text
                  FROM cdc_outbox.settled
                 WHERE slot = %(slot)s AND system_identifier = %(system)s
                   AND (EXISTS (SELECT FROM cdc_outbox.confirmation WHERE slot = %(slot)s)
                        OR (lsn = %(confirmed)s::pg_lsn AND snapshot::text = since::text))
                 ORDER BY pg_snapshot_xmax(snapshot) DESC, settled_at DESC
                 LIMIT 1
                """,
                {"slot": self._slot, "system": self._system_identifier, "confirmed": str(confirmed)},
            ).fetchone()
            if row is None:
                row = self._connection.execute(begin_sql(self._slot) + sql.SQL(" RETURNING since::text")).fetchone()
        assert row is not None
        return str(row[0])

    def _note(self, taken: _Taken) -> None:
        with translated("noting what is settled in cdc_outbox.settled"):
            self._connection.execute(
                "INSERT INTO cdc_outbox.settled (slot, system_identifier, snapshot, lsn, since, taken_at)"
                " VALUES (%s, %s, %s::pg_snapshot, %s::pg_lsn, %s::pg_snapshot, %s)",
                [self._slot, self._system_identifier, taken.snapshot, str(taken.lsn), self._since, taken.at],
            )

    def _thin(self) -> None:
        """Of what is older than an hour keep one note a minute, of what is older than a day one an hour."""
        with translated("thinning out cdc_outbox.settled"):
            self._connection.execute(
                """
                DELETE FROM cdc_outbox.settled AS note
                 USING (SELECT ctid, row_number() OVER (
                                 PARTITION BY system_identifier, since::text,
                                     date_trunc(CASE WHEN settled_at < now() - interval '1 day'
                                                     THEN 'hour' ELSE 'minute' END, settled_at)
                                     ORDER BY pg_snapshot_xmin(snapshot) DESC)
                          FROM cdc_outbox.settled
                         WHERE slot = %s AND settled_at < now() - interval '1 hour' AND snapshot::text <> since::text)
                       AS old (ctid, nth)
                 WHERE note.ctid = old.ctid AND nth > 1
                """,
                [self._slot],
            )


def begin_sql(slot: str) -> sql.Composed:
    """The note of a slot that has just been made: from here on everything comes through it."""
    return sql.SQL(
        "INSERT INTO cdc_outbox.settled (slot, system_identifier, snapshot, lsn, since, taken_at)"
        " SELECT slot_name, system_identifier::text, now, confirmed_flush_lsn, now, clock_timestamp()"
        " FROM pg_replication_slots, pg_control_system(), pg_current_snapshot() AS now WHERE slot_name = {}"
    ).format(slot)


@dataclass(frozen=True, slots=True)
class Known:
    """What a note tells: transactions older than ``before`` that had not ended in ``since`` are settled."""

    before: str
    since: str

    def condition(self, xmin: sql.Composable) -> sql.Composed:
        """Whether the row with this xmin is one of theirs."""
        return sql.SQL(
            "(cdc_outbox.full_xid({xmin}) < {before}::text::xid8"
            " AND NOT pg_visible_in_snapshot(cdc_outbox.full_xid({xmin}), {since}::pg_snapshot))"
        ).format(xmin=xmin, before=self.before, since=self.since)


def known_settled(connection: Connection, slot: str, *, for_at_least: timedelta) -> list[Known]:
    """Of every run of the slot (it may have been made anew) the furthest note that is so old."""
    with translated("reading cdc_outbox.settled"):
        rows = connection.execute(
            """
            SELECT DISTINCT ON (since::text) pg_snapshot_xmin(snapshot)::text, since::text
              FROM cdc_outbox.settled
             WHERE slot = %s AND settled_at <= now() - %s
               AND system_identifier = (SELECT system_identifier::text FROM pg_control_system())
             ORDER BY since::text, pg_snapshot_xmin(snapshot) DESC
            """,
            [slot, for_at_least],
        ).fetchall()
    return [Known(*row) for row in rows]


@dataclass(frozen=True, slots=True)
class StuckRow:
    outbox_id: str
    aggregate_id: str
    event_type: str
    seconds: float | None
    """Since it was committed, or created where the server does not track that; None if the table does not tell."""


def stuck_rows(
    connection: Connection, table: Table, columns: ColumnsConfig, slot: str, *, patience: timedelta
) -> tuple[int, list[StuckRow]]:
    """Rows committed longer ago than ``patience`` that the relay should have settled and has not: how many, and the
    oldest of them.

    Rows from before the slot, and those that became dead letters, are not stuck. Needs SELECT on the table.
    """
    with translated(f"looking for stuck rows in {table}"):
        tracked = connection.execute("SELECT current_setting('track_commit_timestamp')::bool").fetchone() == (True,)
        if tracked:
            committed = sql.SQL("pg_xact_commit_timestamp(event.xmin)")
        elif "created_at" in table.columns:
            committed = sql.SQL("event.created_at::timestamptz")
        else:
            committed = sql.SQL("NULL::timestamptz")
        rows = connection.execute(
            sql.SQL(
                """
                WITH latest AS (
                    SELECT pg_snapshot_xmin(snapshot) AS before, since, taken_at
                      FROM cdc_outbox.settled
                     WHERE slot = {slot}
                       AND system_identifier = (SELECT system_identifier::text FROM pg_control_system())
                     ORDER BY pg_snapshot_xmax(snapshot) DESC, settled_at DESC LIMIT 1)
                SELECT count(*) OVER (), {id}::text, {aggregate_id}::text, {event_type}::text,
                       extract(epoch FROM now() - {committed})::float8
                  FROM latest, {table} AS event
                 WHERE latest.taken_at < now() - {patience}
                   AND coalesce({committed} < now() - {patience}, true)
                   AND cdc_outbox.full_xid(event.xmin) >= latest.before
                   AND NOT pg_visible_in_snapshot(cdc_outbox.full_xid(event.xmin), latest.since)
                   AND NOT EXISTS (SELECT FROM cdc_outbox.dead_letter WHERE event_id = event.{id}::text)
                 ORDER BY {committed} NULLS FIRST
                 LIMIT {most}
                """
            ).format(
                slot=slot,
                table=table.identifier,
                **{field: sql.Identifier(column) for field, column in columns.of(table.columns).items()},
                committed=committed,
                patience=sql.SQL("{}::interval").format(patience),
                most=_MOST_STUCK_SHOWN,
            )
        ).fetchall()
    return (rows[0][0] if rows else 0), [StuckRow(*row[1:]) for row in rows]
