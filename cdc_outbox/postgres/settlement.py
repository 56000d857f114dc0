"""Settlement: the relay notes which transactions are settled, and of which heaps every row was sent.

It takes a snapshot now and then, where the log ends just after it, and what the publication sends. When that LSN is
reached by what is settled, all of it is noted in cdc_outbox.settled (sql/0007_settled.sql says what follows from a
note, and what does not). The slot's own confirmed position is never asked: anybody can move that by hand.
Source: PostgreSQL manual, "Transaction ID and Snapshot Information Functions".
"""

import time
import uuid
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

from psycopg import sql

from cdc_outbox.postgres.catalog import server_major
from cdc_outbox.postgres.connection import Connection, translated
from cdc_outbox.postgres.coverage import Coverage, Covered, SentHeap, extend, sent_heaps
from cdc_outbox.postgres.lsn import LSN
from cdc_outbox.postgres.publication import SentTable

_TAKE_EVERY_SECONDS: Final = 1.0
#: A session reports what it has updated at the latest ten seconds after its transaction (PGSTAT_IDLE_INTERVAL), unless
#: it is in the next one by then. Only so long after a snapshot is PostgreSQL's count of updates sure to tell of it.
_UPDATES_COUNTED_SECONDS: Final = 11.0
_THIN_EVERY_SECONDS: Final = 600.0

_READ_HEAPS: Final = "(SELECT coalesce(json_agg(json_build_array(heap, fingerprint, updates)), '[]') FROM ({}) AS sent)"
#: One statement: its snapshot is taken before the functions ask for the log's end, and for what is counted.
_TAKE: Final = f"""
    SELECT snapshot::text, pg_current_wal_insert_lsn()::text, clock_timestamp(), pg_snapshot_xmin(snapshot)::text,
           pg_snapshot_xmin(snapshot) < pg_snapshot_xmax(snapshot), {_READ_HEAPS}
      FROM pg_current_snapshot() AS snapshot
"""  # noqa: S608 - constants


@dataclass(frozen=True, slots=True)
class _Taken:
    snapshot: str
    lsn: LSN
    at: Any
    """By the server's clock."""
    earlier: str | None
    """The last snapshot from before updates could be on their way to being counted."""


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
        #: events were settled since the last snapshot
        self._carried = True
        #: the last snapshot may have missed something: transactions were open in it, or one that came through the log
        #: just before (it is there a moment before a snapshot sees it as ended), or a heap was seen for the first time
        self._look_again = False
        #: when another snapshot is to be taken so that updates are sure to be counted; monotonic seconds
        self._sure_at = float("inf")
        #: the oldest transaction that was open in the last snapshot
        self._xmin = ""
        #: snapshots of the last seconds, oldest first, with the monotonic seconds of their taking
        self._recent: deque[tuple[float, str]] = deque()
        self._take_at = self._thin_at = time.monotonic()
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
        is_sure = now >= self._sure_at
        if self._taken or now < self._take_at or not (self._carried or self._look_again or is_sure):
            return False
        self._take_at = now + _TAKE_EVERY_SECONDS
        with translated("taking a snapshot"):
            row = self._connection.execute(sql.SQL(_TAKE).format(self._sent_heaps)).fetchone()
        assert row is not None
        snapshot, lsn, at, xmin, some_are_open, heaps = row
        before, self._seen = self._seen, _seen(heaps)
        extended = extend(self._coverage, before, self._seen, snapshot)
        self._look_again = some_are_open or self._carried or extended.keys() != self._seen.keys()
        if extended != self._coverage:
            self._cover(extended)
        elif not self._carried and not is_sure and xmin == self._xmin:
            return False
        if self._carried and not all(covered.complete for covered in extended.values()):
            self._sure_at = now + _UPDATES_COUNTED_SECONDS
        elif is_sure:
            self._sure_at = float("inf")
        self._taken = _Taken(snapshot, LSN.parse(lsn), at, self._earlier(now, snapshot))
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
                SELECT last.id, goes_on, last.coverage::text, heap::int8, since::text, complete, fingerprint, updates
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
            heap: Covered(since, complete, SentHeap(fingerprint, updates))
            for *_, heap, since, complete, fingerprint, updates in rows
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

    def _earlier(self, now: float, snapshot: str) -> str | None:
        self._recent.append((now, snapshot))
        while len(self._recent) > 1 and self._recent[1][0] <= now - _UPDATES_COUNTED_SECONDS:
            self._recent.popleft()
        at, oldest = self._recent[0]
        return oldest if at <= now - _UPDATES_COUNTED_SECONDS else None

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
                    taken.snapshot,
                    taken.earlier,
                    str(taken.lsn),
                    self._coverage_id,
                    taken.at,
                ],
            )
        self._is_coverage_noted = True

    def _note_coverage(self) -> None:
        with self._connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO cdc_outbox.coverage (id, heap, since, complete, fingerprint, updates)"
                " VALUES (%s, %s, %s::pg_snapshot, %s, %s, %s)",
                [
                    (self._coverage_id, heap, each.since, each.complete, each.heap.fingerprint, each.heap.updates)
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
                 USING (SELECT id, row_number() OVER (
                                 PARTITION BY system_identifier, coverage,
                                     date_trunc(CASE WHEN settled_at < now() - interval '1 day'
                                                     THEN 'hour' ELSE 'minute' END, settled_at)
                                     ORDER BY pg_snapshot_xmin(snapshot) DESC, id DESC) AS nth,
                               EXISTS (SELECT FROM cdc_outbox.coverage AS covered
                                        WHERE covered.id = note.coverage
                                          AND (complete OR pg_snapshot_xmin(earlier) > pg_snapshot_xmax(since))) AS says
                          FROM cdc_outbox.settled AS note
                         WHERE slot = %(slot)s AND settled_at < now() - interval '1 hour'
                           AND id <> (SELECT id FROM cdc_outbox.settled WHERE slot = %(slot)s
                                       ORDER BY pg_snapshot_xmax(snapshot) DESC, id DESC LIMIT 1)) AS old
                 WHERE settled.id = old.id AND (nth > 1 OR NOT says)
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
        """INSERT INTO cdc_outbox.coverage (id, heap, since, complete, fingerprint, updates)
SELECT {coverage}, heap, pg_current_snapshot(), false, fingerprint, updates FROM ({heaps}) AS sent;
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
    return {heap: SentHeap(fingerprint, updates) for heap, fingerprint, updates in heaps}
