"""Coverage: of which heaps of the outbox every row is sent, and since when without a break.

A heap is a table that holds rows: the outbox itself, or a partition of it. What the publication sends of one is read as
a *fingerprint* of what never returns to what it was: OIDs, file numbers, and the xmin of catalogue rows that change
with nothing else. Two equal fingerprints then prove that nothing has changed in between, however long that was.

Read from catalogue tables only: they are as old as the statement's snapshot, which functions and views are not.
Source: PostgreSQL manual, "System Catalogs"; "The Cumulative Statistics System" for when updates are counted.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Final

from psycopg import sql

from cdc_outbox.postgres.publication import FILTERS_SINCE

_SENT_HEAPS: Final = """
    WITH RECURSIVE publication AS (
        SELECT oid, xmin AS version, pubinsert, pubviaroot, puballtables
          FROM pg_publication WHERE pubname = {publication}
    ), tree (heap, path, links) AS (
        SELECT {outbox}::oid, ARRAY[{outbox}::oid], ''
        UNION ALL
        -- a partition that left and came back hangs on a new row
        SELECT i.inhrelid, path || i.inhrelid, links || format(' %s@%s', i.inhparent, i.xmin)
          FROM tree JOIN pg_class AS parent ON parent.oid = tree.heap AND parent.relkind = 'p'
          JOIN pg_inherits AS i ON i.inhparent = parent.oid
         WHERE NOT i.inhdetachpending
    )
    SELECT heap::int8,
           concat_ws(' ', format('publication %s@%s', publication.oid, publication.version),
                     -- a table that left and came back has another entry; so has one with another filter
                     (SELECT 'entries ' || string_agg(format('%s@%s', oid, xmin), ',' ORDER BY oid)
                        FROM pg_publication_rel WHERE prpubid = publication.oid AND prrelid = ANY (path)),
                     {schema_entries},
                     format('heap %s %s %s', heap, c.relfilenode, c.relpersistence),
                     format('named %s.%s in %s.%s', n.nspname, c.relname, r.nspname, root.relname),
                     'under' || nullif(links, ''),
                     -- a table that left its schema and came back depends on it by another row
                     (SELECT 'schemas ' || string_agg(format('%s@%s', objid, xmin), ',' ORDER BY objid)
                        FROM pg_depend WHERE classid = 'pg_class'::regclass AND objid = ANY (path) AND objsubid = 0
                         AND refclassid = 'pg_namespace'::regclass)) AS fingerprint,
           CASE WHEN current_setting('track_counts')::bool
                -- counts are reset after a crash, and so do those of the archiver; or by a reset
                THEN concat_ws('@', pg_stat_get_tuples_updated(heap),
                               (SELECT extract(epoch FROM stats_reset) FROM pg_stat_archiver),
                               (SELECT extract(epoch FROM pg_stat_get_db_stat_reset_time(oid))
                                  FROM pg_database WHERE datname = current_database())) END AS updates,
           c.relfilenode::int8 AS file
      FROM tree JOIN pg_class AS c ON c.oid = heap JOIN pg_namespace AS n ON n.oid = c.relnamespace
      JOIN pg_class AS root ON root.oid = path[1] JOIN pg_namespace AS r ON r.oid = root.relnamespace
           CROSS JOIN publication
     WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND pubinsert
       AND CASE WHEN root.relkind = 'p' THEN pubviaroot ELSE true END AND NOT (root.relispartition AND pubviaroot)
       AND (puballtables OR {schema_is_listed}
            OR EXISTS (SELECT FROM pg_publication_rel
                        WHERE prpubid = publication.oid AND prrelid = root.oid AND {unfiltered}))
"""
_SCHEMA_ENTRIES: Final = """(SELECT 'schema entries ' || string_agg(format('%s@%s', oid, xmin), ',' ORDER BY oid)
                        FROM pg_publication_namespace
                       WHERE pnpubid = publication.oid
                         AND pnnspid IN (SELECT relnamespace FROM pg_class WHERE pg_class.oid = ANY (path)))"""
_SCHEMA_IS_LISTED: Final = """EXISTS (SELECT FROM pg_publication_namespace
                         WHERE pnpubid = publication.oid AND pnnspid = root.relnamespace)"""


@dataclass(frozen=True, slots=True)
class SentHeap:
    """What was read of a heap of which every row is sent."""

    fingerprint: str
    updates: str | None
    """None if the server does not count."""
    file: int


@dataclass(frozen=True, slots=True)
class Covered:
    """A heap of which every row was sent that was written by transactions begun after ``since``."""

    since: str
    """A snapshot, as PostgreSQL prints it."""
    complete: bool
    """The heap was empty then: it holds nothing that was never sent, and updates do not matter."""
    heap: SentHeap

    def goes_on_with(self, seen: SentHeap) -> bool:
        if self.complete:
            return seen.fingerprint == self.heap.fingerprint
        return seen == self.heap and seen.updates is not None


#: By the heap's OID.
Coverage = dict[int, Covered]


def extend(
    coverage: Coverage, before: dict[int, SentHeap], seen: dict[int, SentHeap], snapshot: str, restless: Container[int]
) -> Coverage:
    """What is covered now that ``seen`` was read with ``snapshot``, and ``before`` at the time before.

    A heap is covered from the second sight on: updates are counted with a snapshot, not before it. Not a ``restless``
    one, in which updates go on: it would be covered for a moment, again and again.
    """
    extended: Coverage = {}
    for heap, sight in seen.items():
        covered = coverage.get(heap)
        if covered and covered.goes_on_with(sight):
            extended[heap] = covered
        elif before.get(heap) == sight and sight.updates is not None and heap not in restless:
            extended[heap] = Covered(snapshot, complete=False, heap=sight)
    return extended


def sent_heaps(server_major: int, publication: str, outbox: sql.Composable) -> sql.Composed:
    """The query for what is seen of each heap of which every row is sent; ``outbox`` is an OID."""
    filters = server_major >= FILTERS_SINCE
    return sql.SQL(_SENT_HEAPS).format(
        publication=publication,
        outbox=outbox,
        schema_entries=sql.SQL(_SCHEMA_ENTRIES if filters else "NULL"),
        schema_is_listed=sql.SQL(_SCHEMA_IS_LISTED if filters else "false"),
        unfiltered=sql.SQL("prqual IS NULL" if filters else "true"),
    )
