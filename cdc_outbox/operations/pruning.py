"""Pruning: deletes rows of the outbox that are known to be published, and nothing else.

Known is what the relay has noted (settlement.py), of each heap by itself. A dead letter keeps its row until it is
redriven.
An outbox that is partitioned by time loses whole partitions; any other loses rows, a few blocks of the table at a time,
so that no lock and no transaction lasts. Source: PostgreSQL manual, "Table Partitioning", "System Columns" (ctid).
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import psycopg
from psycopg import sql

from cdc_outbox.operations.event_status import known_published
from cdc_outbox.postgres.catalog import Table
from cdc_outbox.postgres.connection import READER, Connection, granting, translated

#: 8 kB each: some thousands of rows in a transaction, a fraction of a second.
_BLOCKS_AT_A_TIME: Final = 128
#: Dropping a partition locks the outbox. Whoever writes waits for us no longer than we wait for them.
_LOCK_TIMEOUT: Final = "1s"

#: By the OID of a heap, the condition by which its rows may go; of other heaps none may.
_MayGo = dict[int, sql.Composed]
#: A publication that sends deletes, whose ever it is, wants to say which row: PostgreSQL refuses them without a key.
_HINTS: Final = {
    "55000": "a publication sends deletes of that table, and it has no key: give it a primary key, or ALTER TABLE ... "
    "REPLICA IDENTITY FULL",
}

#: Called with how much of the work is done and how much there is.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Pruned:
    rows: int
    partitions: tuple[str, ...] = ()
    """Dropped ones; ``rows`` counts theirs."""
    busy: tuple[str, ...] = ()
    """Partitions that could have been dropped, had their lock been free."""


def prune(
    connection: Connection, table: Table, id_column: str, slot: str, *, older_than: timedelta, progress: Progress
) -> Pruned:
    """Delete what was settled through ``slot`` at least ``older_than`` ago.

    Raises OperatorNeeded if the role may not (DELETE on the table and SELECT in schema cdc_outbox; of a partitioned
    table, ownership); SourceUnavailable, and then what was deleted before stays deleted.
    """
    known = known_published(connection, slot, for_at_least=older_than)
    if not known:
        return Pruned(0)
    may_go = {heap: _may_go(told, sql.Identifier("event", id_column)) for heap, told in known.items()}
    rights = granting(connection, READER, f"SELECT, DELETE ON {table.identifier.as_string()}", schema=table.namespace)
    with translated(f"pruning {table}", {**_HINTS, **rights}):
        if _is_partitioned_by_time(connection, table):
            return _drop_partitions(connection, _past_partitions(connection, table, older_than), may_go, progress)
        return Pruned(_delete_rows(connection, _leaves(connection, table), may_go, progress))


def _may_go(published: str, row_id: sql.Identifier) -> sql.Composed:
    """The condition by which a row, ``event``, may go, where the rows of these transactions (a multirange) may."""
    return sql.SQL(
        "({published}::int8multirange @> cdc_outbox.full_xid(event.xmin)::text::bigint AND {id} IS NOT NULL"
        " AND NOT EXISTS (SELECT FROM cdc_outbox.parked AS letter"
        " WHERE letter.event_id = pg_catalog.format('%s', {id}) AND letter.state <> 'redriven'))"
    ).format(published=published, id=row_id)


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A table that holds rows: the outbox itself, or a partition of it."""

    heap: int
    name: sql.Identifier
    blocks: int


def _leaves(connection: Connection, table: Table) -> list[_Leaf]:
    rows = connection.execute(
        """
        SELECT c.oid::int8, n.nspname, c.relname, pg_relation_size(c.oid) / current_setting('block_size')::int
          FROM (SELECT %(table)s::regclass UNION SELECT relid FROM pg_partition_tree(%(table)s)) AS tree (relid)
          JOIN pg_class c ON c.oid = tree.relid
          JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind = 'r'
         ORDER BY n.nspname, c.relname
        """,
        {"table": table.identifier.as_string(connection)},
    ).fetchall()
    return [_Leaf(heap, sql.Identifier(space, name), blocks) for heap, space, name, blocks in rows]


def _delete_rows(connection: Connection, leaves: list[_Leaf], may_go: _MayGo, progress: Progress) -> int:
    leaves = [leaf for leaf in leaves if leaf.heap in may_go]
    total_blocks = sum(leaf.blocks for leaf in leaves)
    deleted = done_blocks = 0
    for leaf in leaves:
        statement = sql.SQL("DELETE FROM ONLY {} AS event WHERE ctid >= {}::text::tid AND ctid < {}::text::tid AND {}")
        for block in range(0, leaf.blocks, _BLOCKS_AT_A_TIME):
            end = min(block + _BLOCKS_AT_A_TIME, leaf.blocks)
            some = statement.format(leaf.name, f"({block},0)", f"({end},0)", may_go[leaf.heap])
            deleted += connection.execute(some).rowcount
            done_blocks += end - block
            progress(done_blocks, total_blocks)
    return deleted


def _is_partitioned_by_time(connection: Connection, table: Table) -> bool:
    """By RANGE of one column that is a date or a timestamp, and no deeper than that."""
    row = connection.execute(
        """
        SELECT 1
          FROM pg_partitioned_table AS part
          JOIN pg_attribute AS a ON a.attrelid = part.partrelid AND a.attnum = part.partattrs[0]
         WHERE part.partrelid = %s::regclass AND part.partstrat = 'r' AND part.partnatts = 1
           AND a.atttypid IN ('date'::regtype, 'timestamp'::regtype, 'timestamptz'::regtype)
           AND NOT EXISTS (SELECT FROM pg_partition_tree(part.partrelid) WHERE level > 1)
        """,
        [table.identifier.as_string(connection)],
    ).fetchone()
    return row is not None


def _past_partitions(connection: Connection, table: Table, older_than: timedelta) -> list[tuple[int, sql.Identifier]]:
    """Those into which nothing belongs that was written within ``older_than``. Never the default one."""
    rows = connection.execute(
        """
        SELECT c.oid::int8, n.nspname, c.relname
          FROM pg_inherits AS i
          JOIN pg_class AS c ON c.oid = i.inhrelid
          JOIN pg_namespace AS n ON n.oid = c.relnamespace
         WHERE i.inhparent = %s::regclass AND c.relkind = 'r' AND NOT i.inhdetachpending
           -- of one column, so FOR VALUES FROM (...) TO ('2026-01-01'), or TO (MAXVALUE)
           AND substring(pg_get_expr(c.relpartbound, c.oid) FROM 'TO \\(''(.*)''\\)')::timestamptz <= now() - %s
         ORDER BY n.nspname, c.relname
        """,
        [table.identifier.as_string(connection), older_than],
    ).fetchall()
    return [(heap, sql.Identifier(*name)) for heap, *name in rows]


def _drop_partitions(
    connection: Connection, partitions: list[tuple[int, sql.Identifier]], may_go: _MayGo, progress: Progress
) -> Pruned:
    rows = 0
    dropped: list[str] = []
    busy: list[str] = []
    for done, (heap, partition) in enumerate(partitions, start=1):
        try:
            count = _drop(connection, partition, may_go[heap]) if heap in may_go else 0
        except psycopg.errors.LockNotAvailable:
            busy.append(partition.as_string(connection))
        else:
            rows += count
            if count:
                dropped.append(partition.as_string(connection))
        progress(done, len(partitions))
    return Pruned(rows, tuple(dropped), tuple(busy))


def _drop(connection: Connection, partition: sql.Identifier, may_go: sql.Composed) -> int:
    """Drop it if all of its rows may go; how many there were, 0 if it stays (an empty one does too)."""
    if not _rows_if_all_may_go(connection, partition, may_go):
        return 0
    with connection.transaction():
        connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(_LOCK_TIMEOUT))
        connection.execute(sql.SQL("LOCK TABLE ONLY {} IN SHARE ROW EXCLUSIVE MODE").format(partition))
        # Once more, now that nobody can write to it; the look before kept most of the time out of the lock.
        count = _rows_if_all_may_go(connection, partition, may_go)
        if count:
            connection.execute(sql.SQL("DROP TABLE {}").format(partition))
    return count


def _rows_if_all_may_go(connection: Connection, partition: sql.Identifier, may_go: sql.Composed) -> int:
    query = sql.SQL("SELECT count(*) FILTER (WHERE {}), count(*) FROM ONLY {} AS event")
    row = connection.execute(query.format(may_go, partition)).fetchone()
    assert row is not None
    going, total = row
    return int(total) if going == total else 0
