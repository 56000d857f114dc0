"""What a publication sends of the outbox: which tables, which columns, which rows, and under which table's name.

Asked of the catalogue's *tables*. The views (pg_publication_tables) and functions (pg_partition_tree) wait for whoever
has locked the outbox, and see a newer state than the statement's snapshot.
Source: PostgreSQL manual, "Logical Replication" (Publication, Row Filters, Column Lists, Generated Column Replication),
"System Catalogs" (pg_publication and its companions, pg_inherits).
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from psycopg import sql

from cdc_outbox.errors import OperatorNeeded
from cdc_outbox.postgres.catalog import Table, server_major
from cdc_outbox.postgres.connection import MIGRATE_HINT, Connection, translated

#: Row filters, column lists and TABLES IN SCHEMA.
FILTERS_SINCE: Final = 15
_GENERATED_SINCE: Final = 18


@dataclass(frozen=True, slots=True)
class Publication:
    oid: int
    name: str
    publishes_inserts: bool
    publishes_more: bool
    via_root: bool
    of_all_tables: bool
    #: it has TABLES IN SCHEMA; of which schemas does not matter here
    of_schemas: bool
    #: tables listed one by one, by OID
    listed: frozenset[int]
    stored_generated: bool
    """Whether it sends stored generated columns."""

    @property
    def identifier(self) -> str:
        """Quoted, for statements."""
        return sql.Identifier(self.name).as_string()


@dataclass(frozen=True, slots=True)
class SentTable:
    """The outbox as a publication sends it."""

    publication: Publication
    table: Table
    #: OIDs under which its rows may come: its own and its partitions'
    oids: frozenset[int]
    #: columns that are sent, name to type OID
    columns: dict[str, int]
    #: tables that inherit from it, or are in the publication besides, and hold no events
    ignored: Collection[str]


@dataclass(frozen=True, slots=True)
class _Member:
    """The outbox, a partition of it, or a table that inherits from it."""

    oid: int
    namespace: str
    name: str
    kind: str
    persistence: str
    is_partition: bool

    def __str__(self) -> str:
        return f"{self.namespace}.{self.name}"


def find_publication(connection: Connection, name: str) -> Publication | None:
    major = server_major(connection)
    schemas = "EXISTS (SELECT FROM pg_publication_namespace WHERE pnpubid = p.oid)"
    if major < FILTERS_SINCE:
        schemas = "false"
    generated = "p.pubgencols = 's'" if major >= _GENERATED_SINCE else "false"
    with translated(f"looking up publication {name}"):
        row = connection.execute(
            f"""
            SELECT p.oid::int8, p.pubname, p.pubinsert, p.pubupdate OR p.pubdelete OR p.pubtruncate, p.pubviaroot,
                   p.puballtables, {schemas},
                   ARRAY(SELECT prrelid::int8 FROM pg_publication_rel WHERE prpubid = p.oid), {generated}
              FROM pg_publication AS p WHERE p.pubname = %s
            """.encode(),  # noqa: S608 - constants, chosen by version
            [name],
        ).fetchone()
    if row is None:
        return None
    oid, pubname, inserts, more, via_root, of_all_tables, of_schemas, listed, stored = row
    return Publication(oid, pubname, inserts, more, via_root, of_all_tables, of_schemas, frozenset(listed), stored)


def check_publication(connection: Connection, name: str, table: Table, *, ignored: Collection[str] = ()) -> SentTable:
    """See that publication ``name`` sends every row of ``table``; return what it sends of it.

    ``ignored`` names tables that may inherit from it. Raises OperatorNeeded for what is not sent, with what to do.
    """
    publication = find_publication(connection, name)
    if publication is None:
        raise OperatorNeeded(f"publication {name!r} does not exist", hint=MIGRATE_HINT)
    members = _members(connection, table)
    _check_members(publication, members, ignored)
    _check_listed(connection, publication, table)
    return SentTable(
        publication,
        table,
        frozenset(member.oid for member in members if member.oid == table.oid or member.is_partition),
        _sent_columns(connection, publication, table),
        ignored,
    )


def unrouted(connection: Connection, sent: SentTable) -> list[str]:
    """Tables that the publication lists one by one, and whose first row would end the relay."""
    with translated(f"looking up what else publication {sent.publication.name} lists"):
        rows = connection.execute(
            "SELECT nspname || '.' || relname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace"
            " WHERE pg_class.oid = ANY(%s) AND NOT pg_class.oid = ANY(%s) AND nspname <> 'cdc_outbox' ORDER BY 1",
            [list(sent.publication.listed), list(sent.oids)],
        ).fetchall()
    return [name for (name,) in rows if name not in sent.ignored]


def wasteful(publication: Publication) -> list[str]:
    """What it sends that the relay has no use for, a line each."""
    if publication.publishes_more:
        return [f"publication {publication.name!r} publishes more than inserts; the relay ignores the rest"]
    return []


def _members(connection: Connection, table: Table) -> list[_Member]:
    """The outbox first."""
    with translated(f"looking up partitions of {table}"):
        rows = connection.execute(
            """
            WITH RECURSIVE tree (oid, level) AS (
                SELECT %s::oid, 0
                UNION ALL
                SELECT i.inhrelid, level + 1 FROM tree JOIN pg_inherits AS i ON i.inhparent = tree.oid
                 WHERE NOT i.inhdetachpending)
            SELECT c.oid::int8, n.nspname, c.relname, c.relkind, c.relpersistence, c.relispartition
              FROM tree JOIN pg_class AS c USING (oid) JOIN pg_namespace AS n ON n.oid = c.relnamespace
             WHERE level = 0 OR c.relpersistence <> 't'  -- a temporary child is its session's alone
             ORDER BY level, n.nspname, c.relname
            """,
            [table.oid],
        ).fetchall()
    return [_Member(*row) for row in rows]


def _check_members(publication: Publication, members: list[_Member], ignored: Collection[str]) -> None:
    """Raises OperatorNeeded for the first whose rows are not sent, or not as the outbox's."""
    outbox, *others = members
    others = [member for member in others if str(member) not in ignored]
    name = publication.identifier
    if not publication.publishes_inserts:
        raise OperatorNeeded(
            f"publication {publication.name!r} does not publish inserts",
            hint=f"ALTER PUBLICATION {name} SET (publish = 'insert')",
        )
    for member in (outbox, *others):
        if member.persistence == "u":
            raise OperatorNeeded(
                f"table {member} is unlogged: its rows never reach the log",
                hint=f"ALTER TABLE {_quoted(member)} SET LOGGED; what was written before is not sent",
            )
        if member.kind == "f":
            raise OperatorNeeded(
                f"table {member}, of {outbox}, is a foreign table: its rows never reach the log",
                hint=f"ALTER TABLE {_quoted(outbox)} DETACH PARTITION {_quoted(member)}",
            )
    for member in others:
        if not member.is_partition:
            raise OperatorNeeded(
                f"table {member} inherits from {outbox}: what is written to it does not come as the outbox's",
                hint=f"ALTER TABLE {_quoted(member)} NO INHERIT {_quoted(outbox)}, or make it a partition; if it holds "
                "no events, name it in outbox.ignore_tables",
            )
    if outbox.kind == "p" and not publication.via_root:
        raise OperatorNeeded(
            f"publication {publication.name!r} sends rows of {outbox} under the names of its partitions",
            hint=f"ALTER PUBLICATION {name} SET (publish_via_partition_root = true)",
        )
    if outbox.is_partition and publication.via_root:
        raise OperatorNeeded(
            f"table {outbox} is a partition, and publication {publication.name!r} may send its rows under the name of "
            "the table that it belongs to",
            hint=f"let outbox.table name that table, or ALTER PUBLICATION {name} SET (publish_via_partition_root = "
            "false)",
        )


def _check_listed(connection: Connection, publication: Publication, table: Table) -> None:
    """Raises OperatorNeeded unless the publication sends the table, and every row of it."""
    if publication.of_all_tables:
        return
    filters = server_major(connection) >= FILTERS_SINCE
    schema_is_listed = (
        "EXISTS (SELECT FROM pg_publication_namespace WHERE pnpubid = %(publication)s AND pnnspid = c.relnamespace)"
    )
    with translated(f"looking up what publication {publication.name} sends of {table}"):
        row = connection.execute(
            f"""
            SELECT {schema_is_listed if filters else "false"}, entry.oid IS NOT NULL,
                   {"entry.prqual IS NOT NULL" if filters else "false"}
              FROM pg_class AS c
              LEFT JOIN pg_publication_rel AS entry ON entry.prrelid = c.oid AND entry.prpubid = %(publication)s
             WHERE c.oid = %(table)s
            """.encode(),  # noqa: S608 - constants, chosen by version
            {"publication": publication.oid, "table": table.oid},
        ).fetchone()
    in_schema, is_listed, is_filtered = row or (False, False, False)
    name, qualified = publication.identifier, table.identifier.as_string()
    if not in_schema and not is_listed:
        raise OperatorNeeded(
            f"publication {publication.name!r} does not list table {table}",
            hint=f"ALTER PUBLICATION {name} ADD TABLE {qualified}; what is written before that is not sent",
        )
    if is_filtered and not in_schema:
        raise OperatorNeeded(
            f"publication {publication.name!r} sends only some rows of {table}: it has a row filter",
            hint=f"in one transaction: ALTER PUBLICATION {name} DROP TABLE {qualified}; "
            f"ALTER PUBLICATION {name} ADD TABLE {qualified}; what the filter kept back before is not sent",
        )


def _sent_columns(connection: Connection, publication: Publication, table: Table) -> dict[str, int]:
    filters = server_major(connection) >= FILTERS_SINCE
    # A list names columns by number; a publication that has the whole schema, or all tables, has no list.
    listed = "(entry.prattrs IS NULL OR a.attnum = ANY(entry.prattrs::int2[]))" if filters else "true"
    in_list = "entry.prattrs IS NOT NULL" if filters else "false"
    with translated(f"looking up which columns of {table} are sent"):
        rows: list[tuple[Any, ...]] = connection.execute(
            f"""
            SELECT a.attname, a.atttypid::int8
              FROM pg_attribute AS a
              LEFT JOIN pg_publication_rel AS entry ON entry.prrelid = a.attrelid AND entry.prpubid = %s
             WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped AND {listed}
               AND (a.attgenerated = '' OR {in_list} OR (a.attgenerated = 's' AND %s))
             ORDER BY a.attnum
            """.encode(),  # noqa: S608 - constants, chosen by version
            [publication.oid, table.oid, publication.stored_generated],
        ).fetchall()
    return dict(rows)


def _quoted(member: _Member) -> str:
    return sql.Identifier(member.namespace, member.name).as_string()
