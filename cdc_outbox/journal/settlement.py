"""Settlement: the relay notes which transactions are settled, and of which heaps every row was sent.

It takes a snapshot now and then, where the log ends just after it, and what the publication sends. When that LSN is
reached by what is settled, all of it is noted in cdc_outbox.settled (sql/0006_settled.sql says what follows from a
note, and what does not). The slot's own confirmed position says nothing of that: anybody can move it by hand.
Source: PostgreSQL manual, "Transaction ID and Snapshot Information Functions".
"""

import time
import uuid
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Any, Final

from psycopg import sql

from cdc_outbox.errors import SourceUnavailable
from cdc_outbox.journal.coverage import Coverage, Covered, SentHeap, extend, sent_heaps
from cdc_outbox.journal.snapshots import COUNTED_SECONDS, Snapshot, Snapshots
from cdc_outbox.postgres.catalog import server_major
from cdc_outbox.postgres.connection import Connection, translated
from cdc_outbox.postgres.publication import SentTable
from cdc_outbox.wal.lsn import LSN

_TAKE_EVERY_SECONDS: Final = 1.0
#: How often an idle relay looks at what is sent: a partition that was made in the meantime.
_LOOK_EVERY_SECONDS: Final = 15.0
_THIN_EVERY_SECONDS: Final = 600.0

_READ_HEAPS: Final = (
    "(SELECT coalesce(json_agg(json_build_array(heap, fingerprint, updates, file)), '[]') FROM ({}) AS sent)"
)
#: One statement: its snapshot is taken before the functions ask for the log's end, and for what is open and counted.
_TAKE: Final = f"""
    SELECT snapshot::text, pg_snapshot_xmin(snapshot)::text::bigint, pg_snapshot_xmax(snapshot)::text::bigint,
           pg_current_wal_insert_lsn()::text, clock_timestamp(), {_READ_HEAPS},
           ARRAY(SELECT split_part(virtualtransaction, '/', 1) FROM pg_locks
                  WHERE locktype = 'virtualxid' AND pid <> pg_backend_pid()
                    AND pid NOT IN (SELECT active_pid FROM pg_replication_slots WHERE active_pid IS NOT NULL))
      FROM pg_current_snapshot() AS snapshot
"""  # noqa: S608 - constants


@dataclass(frozen=True, slots=True)
class _Taken:
    """A note in the making."""

    ended: Snapshot
    counted: Snapshot | None
    lsn: LSN
    at: Any
    """By the server's clock."""


class Settlement:
    """What one session notes of its slot. Raises in every method what ``translated`` says."""

    def __init__(
        self, connection: Connection, slot: str, system_identifier: str, sent: SentTable, *, confirmed: LSN
    ) -> None:
        """``confirmed`` is where the slot stands now, with nothing confirmed beyond it."""
        self._connection = connection
        self._slot = slot
        self._system_identifier = system_identifier
        self._sent_heaps = sent_heaps(server_major(connection), sent.publication.name, sql.Literal(sent.table.oid))
        self._taken: _Taken | None = None
        #: events were settled since the last look
        self._carried = True
        #: all transactions that they came from are below; and when that was, monotonic seconds
        self._carried_below, self._carried_at = 0, 0.0
        #: all transactions below are noted as ended; as counted
        self._ended_below = self._counted_below = 0
        self._snapshots = Snapshots()
        #: heaps in which updates were counted lately, and when
        self._updated_at: dict[int, float] = {}
        self._take_at = self._thin_at = self._looked_at = time.monotonic()
        self._seen = self._read_heaps()
        self._coverage_id, self._coverage = "", Coverage()
        self._is_coverage_noted = True
        self._go_on(confirmed)

    def carried(self) -> None:
        """Events were settled."""
        self._carried = True

    def take_if_due(self) -> bool:
        """Take a snapshot, at most once a second, to be noted when everything before it is settled.

        False if none was taken, or it tells no more than the last one.
        """
        now = time.monotonic()
        if self._taken or now < self._take_at or not self._is_due(now):
            return False
        self._take_at, self._looked_at = now + _TAKE_EVERY_SECONDS, now
        with translated("taking a snapshot"):
            row = self._connection.execute(sql.SQL(_TAKE).format(self._sent_heaps)).fetchone()
        assert row is not None
        snapshot, xmin, xmax, lsn, at, heaps, in_transaction = row
        has_carried, self._carried = self._carried, False
        if has_carried:
            self._carried_below, self._carried_at = xmax, now
        self._snapshots.add(Snapshot(now, snapshot, xmin, xmax), frozenset(in_transaction))
        is_extended = self._look(now, snapshot, _seen(heaps))
        ended, counted = self._snapshots.ended, self._snapshots.counted
        if ended is None or not (has_carried or is_extended or self._tells_more(ended, counted)):
            return False
        self._taken = _Taken(ended, counted, LSN.parse(lsn), at)
        self._ended_below, self._counted_below = ended.xmin, counted.xmin if counted else 0
        return True

    def _is_due(self, now: float) -> bool:
        is_counted_by_now = now >= self._carried_at + COUNTED_SECONDS
        return (
            self._carried
            or self._ended_below < self._carried_below
            or (self._updates_matter and is_counted_by_now and self._counted_below < self._carried_below)
            or any(heap not in self._coverage and not self._is_restless(heap, now) for heap in self._seen)
            or now - self._looked_at >= _LOOK_EVERY_SECONDS
        )

    @property
    def _updates_matter(self) -> bool:
        return any(not covered.complete for covered in self._coverage.values())

    def _is_restless(self, heap: int, now: float) -> bool:
        return now - self._updated_at.get(heap, float("-inf")) < COUNTED_SECONDS

    def _tells_more(self, ended: Snapshot, counted: Snapshot | None) -> bool:
        """Than the last note, of events that it did not cover."""
        if self._ended_below < self._carried_below and ended.xmin > self._ended_below:
            return True
        if counted is None or not self._updates_matter:
            return False
        return self._counted_below < self._carried_below and counted.xmin > self._counted_below

    def _look(self, now: float, snapshot: str, seen: dict[int, SentHeap]) -> bool:
        """Whether what is covered has changed."""
        for heap, sight in seen.items():
            if heap in self._seen and self._seen[heap].updates != sight.updates:
                self._updated_at[heap] = now
        restless = {heap for heap in seen if self._is_restless(heap, now)}
        extended = extend(self._coverage, self._seen, seen, snapshot, restless)
        self._seen = seen
        if extended == self._coverage:
            return False
        self._cover(extended)
        return True

    def settled(self, lsn: LSN) -> None:
        """Everything up to ``lsn`` is settled: note the snapshot that waited for it."""
        if not self._taken or lsn < self._taken.lsn:
            return
        self._note(self._taken)
        self._taken = None
        if time.monotonic() >= self._thin_at:
            self._thin_at = time.monotonic() + _THIN_EVERY_SECONDS
            with suppress(SourceUnavailable):  # too many at once for the time it may take: another time
                self._thin()

    def _read_heaps(self) -> dict[int, SentHeap]:
        with translated("reading what the publication sends"):
            row = self._connection.execute(sql.SQL("SELECT " + _READ_HEAPS).format(self._sent_heaps)).fetchone()
        assert row is not None
        return _seen(row[0])

    def _go_on(self, confirmed: LSN) -> None:
        """Take over from the slot's last note what is unbroken since, and note at once what is not.

        It goes on from there as long as Continuity knows of the slot. Of a slot it does not know, it began where it
        stands, if `migrate` has noted that when it made it; else nothing is known of what came before. Not noted at
        once, a break would be forgotten by the next session, should this one settle events and note no snapshot.
        """
        with translated("reading cdc_outbox.settled"):
            rows = self._connection.execute(
                """
                SELECT last.id, goes_on, last.coverage::text,
                       heap::int8, since::text, complete, fingerprint, updates, file::int8
                  FROM (SELECT id, coverage, lsn = %(confirmed)s::pg_lsn
                               OR EXISTS (SELECT FROM cdc_outbox.confirmation WHERE slot = %(slot)s) AS goes_on
                          FROM cdc_outbox.settled
                         WHERE slot = %(slot)s AND system_identifier = %(system)s
                         ORDER BY pg_snapshot_xmax(snapshot) DESC, id DESC
                         LIMIT 1) AS last
                  LEFT JOIN cdc_outbox.coverage ON coverage.id = last.coverage
                """,
                {"slot": self._slot, "system": self._system_identifier, "confirmed": str(confirmed)},
            ).fetchall()
        if not rows:
            return
        last, slot_goes_on, coverage_id, *_ = rows[0]
        noted = {
            heap: Covered(since, complete, SentHeap(*sight))
            for _, _, _, heap, since, complete, *sight in rows
            if heap is not None
        }
        unbroken = {
            heap: covered
            for heap, covered in noted.items()
            if slot_goes_on and heap in self._seen and covered.goes_on_with(self._seen[heap])
        }
        if unbroken == noted:
            self._coverage_id, self._coverage = coverage_id, noted
            return
        self._cover(unbroken)
        with translated("noting what is covered in cdc_outbox.settled"), self._connection.transaction():
            self._note_coverage()
            self._connection.execute(
                "INSERT INTO cdc_outbox.settled (slot, system_identifier, snapshot, earlier, lsn, coverage, taken_at)"
                " SELECT slot, system_identifier, snapshot, earlier, lsn, %s, taken_at"
                " FROM cdc_outbox.settled WHERE id = %s",
                [self._coverage_id, last],
            )
        self._is_coverage_noted = True

    def _cover(self, coverage: Coverage) -> None:
        self._coverage_id, self._coverage = str(uuid.uuid4()), coverage
        self._is_coverage_noted = False

    def _note(self, taken: _Taken) -> None:
        with translated("noting what is settled in cdc_outbox.settled"), self._connection.transaction():
            if not self._is_coverage_noted:
                self._note_coverage()
            self._connection.execute(
                "INSERT INTO cdc_outbox.settled (slot, system_identifier, snapshot, earlier, lsn, coverage, taken_at)"
                " VALUES (%s, %s, %s::pg_snapshot, %s::pg_snapshot, %s::pg_lsn, %s, %s)",
                [
                    self._slot,
                    self._system_identifier,
                    taken.ended.text,
                    taken.counted and taken.counted.text,
                    str(taken.lsn),
                    self._coverage_id,
                    taken.at,
                ],
            )
        self._is_coverage_noted = True

    def _note_coverage(self) -> None:
        with self._connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO cdc_outbox.coverage (id, heap, since, complete, fingerprint, updates, file)"
                " VALUES (%s, %s, %s::pg_snapshot, %s, %s, %s, %s)",
                [
                    (self._coverage_id, heap, each.since, each.complete, *astuple(each.heap))
                    for heap, each in self._coverage.items()
                ],
            )

    def _thin(self) -> None:
        """Of what is older than an hour keep one note a minute, of what is older than a day one an hour.

        Of each coverage that says anything the last note stays: it is the furthest that it goes.
        """
        with translated("thinning out cdc_outbox.settled"), self._connection.transaction():
            self._connection.execute(
                """
                DELETE FROM cdc_outbox.settled
                 USING (SELECT id, row_number() OVER (bucket ORDER BY pg_snapshot_xmin(snapshot) DESC, id DESC) AS nth,
                               row_number() OVER (bucket ORDER BY pg_snapshot_xmin(earlier) DESC NULLS LAST, id DESC)
                                   AS nth_earlier,
                               EXISTS (SELECT FROM cdc_outbox.coverage AS covered
                                        WHERE covered.id = note.coverage
                                          AND (complete OR pg_snapshot_xmin(earlier) > pg_snapshot_xmax(since))) AS says
                          FROM cdc_outbox.settled AS note
                         WHERE slot = %(slot)s AND settled_at < now() - interval '1 hour'
                           AND id <> (SELECT id FROM cdc_outbox.settled WHERE slot = %(slot)s
                                       ORDER BY pg_snapshot_xmax(snapshot) DESC, id DESC LIMIT 1)
                        WINDOW bucket AS (PARTITION BY system_identifier, coverage,
                                              date_trunc(CASE WHEN settled_at < now() - interval '1 day'
                                                              THEN 'hour' ELSE 'minute' END, settled_at))) AS old
                 WHERE settled.id = old.id AND ((nth > 1 AND nth_earlier > 1) OR NOT says)
                """,
                {"slot": self._slot},
            )
            self._connection.execute(
                "DELETE FROM cdc_outbox.coverage"
                " WHERE NOT EXISTS (SELECT FROM cdc_outbox.settled WHERE settled.coverage = coverage.id)"
            )


def begin_sql(
    server_major: int, slot: str, publication: str, outbox: sql.Identifier, *, may_read: bool
) -> sql.Composed:
    """The first note of a slot that has just been made: from here on everything comes through it.

    Several statements: what is counted must be counted before the snapshot. ``may_read``: whether the outbox may be
    asked if it is empty.
    """
    is_empty = sql.SQL("NOT EXISTS (SELECT FROM {})").format(outbox) if may_read else sql.SQL("false")
    return sql.SQL(
        """INSERT INTO cdc_outbox.coverage (id, heap, since, complete, fingerprint, updates, file)
SELECT {coverage}, heap, pg_current_snapshot(), false, fingerprint, updates, file FROM ({heaps}) AS sent;
INSERT INTO cdc_outbox.settled (slot, system_identifier, snapshot, lsn, coverage, taken_at)
SELECT slot_name, system_identifier::text, pg_current_snapshot(), confirmed_flush_lsn, {coverage}, clock_timestamp()
  FROM pg_replication_slots, pg_control_system() WHERE slot_name = {slot};
UPDATE cdc_outbox.coverage SET since = pg_current_snapshot(), complete = {is_empty} WHERE id = {coverage};"""
    ).format(
        coverage=sql.SQL("{}::uuid").format(str(uuid.uuid4())),
        heaps=sent_heaps(server_major, publication, sql.SQL("{}::regclass").format(sql.Literal(outbox.as_string()))),
        slot=slot,
        is_empty=is_empty,
    )


def _seen(heaps: list[list[Any]]) -> dict[int, SentHeap]:
    return {heap: SentHeap(*sight) for heap, *sight in heaps}
