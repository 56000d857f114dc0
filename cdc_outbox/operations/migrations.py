"""Migrations: installs the files of sql/ in their order, then publication and slot as this configuration names them.

The files are plain SQL that a DBA can run with psql; nothing is substituted in them. A file may begin with
``-- cdc-outbox: only if KEY = VALUE and ...`` and is then passed over when this configuration differs, because then
the application brings that table or publication itself.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal

import psycopg
from psycopg import sql

from cdc_outbox import shipped_sql
from cdc_outbox.config import ColumnsConfig
from cdc_outbox.errors import OperatorNeeded
from cdc_outbox.journal import continuity, settlement
from cdc_outbox.postgres.catalog import check_server, find_table, server_major
from cdc_outbox.postgres.connection import READER, SLOT_HINTS, Connection, granting, translated
from cdc_outbox.postgres.publication import check_publication, wasteful
from cdc_outbox.postgres.slots import check_slot, check_whose_slot, create_slot_sql, find_slot, recreate_hint

#: Any number, as long as every cdc-outbox uses the same one: 'cdcob' in ASCII.
_ADVISORY_LOCK: Final = 0x6364636F62
_TABLE_FILE: Final = "0002_outbox_table.sql"
_PUBLICATION_FILE: Final = "0010_publication.sql"
#: Tables of ours whose inserts the relay has to hear of.
_HEARD_TABLES: Final = ("request", "canary")
#: Roles and all rights to the relay's schema. Not one of the files in order: it comes after everything, each time.
_ROLES_FILE: Final = "roles.sql"
_ROLES_HINTS: Final = {"42501": "let the owner of everything in schema cdc_outbox, or a superuser, run sql/roles.sql"}
_STEP_HINTS: Final = {
    **SLOT_HINTS,
    "2BP01": "drop what depends on view cdc_outbox.event_status, and make it again after",
}
_CONDITION: Final = re.compile(r"-- cdc-outbox: only if (.+)")

State = Literal["applied", "pending", "changed", "not needed"]
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Target:
    """What the configuration says that matters here."""

    table: str
    publication: str
    slot: str
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)

    def settings(self) -> Mapping[str, str]:
        table = self.table.replace('"', "")
        table = table if "." in table else f"public.{table}"
        return {"outbox.table": table, "postgres.publication": self.publication, "postgres.slot": self.slot}


@dataclass(frozen=True, slots=True)
class Migration:
    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def applies_to(self, target: Target) -> bool:
        condition = _CONDITION.match(self.text)
        if condition is None:
            return True
        wanted = (pair.split(" = ") for pair in condition[1].split(" and "))
        return all(target.settings()[key] == value for key, value in wanted)


@dataclass(frozen=True, slots=True)
class Status:
    name: str
    state: State
    applied_at: datetime | None = None


def load_migrations() -> list[Migration]:
    """The files of sql/ in order."""
    return [
        Migration(path.name, path.read_text(encoding="utf-8"))
        for path in sorted(shipped_sql.folder().glob("[0-9]*.sql"))
    ]


def status(connection: Connection, target: Target) -> list[Status]:
    """How each file stands in this database."""
    applied = _applied(connection)
    return [_status_of(migration, applied.get(migration.name), target) for migration in load_migrations()]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing `up` does: a title for people, a script for psql."""

    title: str
    script: str


def plan(connection: Connection, target: Target, *, failover: bool) -> list[Step]:
    """What is missing, in the order that matters: files, then the publication, then the slot.

    Raises OperatorNeeded if a file was changed after it was applied, or what is there does not fit together;
    ConfigurationError if failover slots are asked of a server that has none.
    """
    slot = find_slot(connection, target.slot)
    if slot is not None:
        check_whose_slot(connection, slot)
    pending = _pending(connection, target)
    steps = [Step(f"apply {migration.name}", _script(connection, migration)) for migration in pending]
    made = {migration.name for migration in pending}
    listed = _heard_tables_listed(connection, target.publication)
    if listed is None:
        if slot is not None:
            raise OperatorNeeded(
                f"slot {target.slot!r} is older than publication {target.publication!r}, which does not exist",
                hint="a publication made now would not serve what that slot has yet to read; name the one that it was "
                f"made for with postgres.publication; if there is none, {recreate_hint(slot.name, slot.database)}",
            )
        if _PUBLICATION_FILE not in made:
            script = _publication_script(connection, target, table_is_made=_TABLE_FILE in made)
            steps.append(Step(f"create publication {target.publication}", script))
    else:
        for table in _HEARD_TABLES:
            if table not in listed and _PUBLICATION_FILE not in made:
                name = sql.Identifier(target.publication).as_string(connection)
                script = f"ALTER PUBLICATION {name} ADD TABLE cdc_outbox.{table};"
                steps.append(Step(f"add cdc_outbox.{table} to publication {target.publication}", script))
    if slot is None:
        script = create_slot_sql(connection, target.slot, failover=failover)
        begin = _begin_script(connection, target, table_is_made=_TABLE_FILE in made)
        steps.append(Step(f"create slot {target.slot} (waits for open transactions to end)", f"{script}\n{begin}"))
    elif slot.active_pid is None and not _is_noted(connection, target.slot):
        # made by hand, or by an `up` that was cut off: what comes from now on is known to come through it
        begin = _begin_script(connection, target, table_is_made=_TABLE_FILE in made, has_waited=False)
        steps.append(Step(f"note where slot {target.slot} stands", begin))
    return steps + _view_steps(connection, target, table_is_made=_TABLE_FILE in made)


def roles_step() -> Step:
    """Makes the roles and gives them their rights, whatever they had before. It is not known whether it is needed."""
    return Step("set the rights of the roles", shipped_sql.read(_ROLES_FILE))


def up(connection: Connection, target: Target, *, failover: bool, report: Report) -> None:
    """Carry out the plan and check the result. Idempotent; concurrent calls wait for each other.

    Raises OperatorNeeded; ConfigurationError as ``plan`` does.
    """
    check_server(connection)
    with _advisory_lock(connection):
        for step in plan(connection, target, failover=failover):
            report(step.title)
            with translated(step.title, _STEP_HINTS):
                connection.execute(step.script.encode())
        _set_rights(connection, report)
        check_slot(connection, target.slot)
        table = find_table(connection, target.table)
        for waste in wasteful(check_publication(connection, target.publication, table).publication):
            report(waste)


def _set_rights(connection: Connection, report: Report) -> None:
    """Reported if it changes anything; so is what the server warns of."""

    def on_notice(notice: psycopg.errors.Diagnostic) -> None:
        report(f"warning: {notice.message_primary}{f' -- {notice.message_hint}' if notice.message_hint else ''}")

    before, step = _rights(connection), roles_step()
    connection.add_notice_handler(on_notice)
    with translated(step.title, _ROLES_HINTS):
        connection.execute(step.script.encode())
    connection.remove_notice_handler(on_notice)
    if _rights(connection) != before:
        report(step.title)


def _rights(connection: Connection) -> set[tuple[str, ...]]:
    """All that is granted in the relay's schema, and to its reader elsewhere."""
    with translated("looking up rights in cdc_outbox"):
        rows = connection.execute(
            """
            SELECT nspname::text, granted::text FROM pg_namespace, unnest(nspacl) AS granted
             WHERE nspname = 'cdc_outbox'
             UNION ALL
            SELECT relname::text, granted::text FROM pg_class, unnest(relacl) AS granted
             WHERE relnamespace = 'cdc_outbox'::regnamespace OR granted::text LIKE 'cdc_outbox_reader=%'
             UNION ALL
            SELECT attrelid::regclass || '.' || attname, granted::text
              FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid, unnest(attacl) AS granted
             WHERE relnamespace = 'cdc_outbox'::regnamespace
                OR granted::text LIKE 'cdc_outbox_reader=%'
            """
        ).fetchall()
    return set(rows)


def _pending(connection: Connection, target: Target) -> list[Migration]:
    """What is to be applied. Raises OperatorNeeded if a file was changed after it was applied."""
    migrations, stands = load_migrations(), status(connection, target)
    for stand in stands:
        if stand.state == "changed":
            raise OperatorNeeded(
                f"migration {stand.name} was changed after it was applied on {stand.applied_at:%Y-%m-%d}",
                hint="restore the file; a new change belongs into a new file",
            )
    return [migration for migration, stand in zip(migrations, stands, strict=True) if stand.state == "pending"]


def _heard_tables_listed(connection: Connection, publication: str) -> set[str] | None:
    """Which of them the publication lists (one for all tables, all of them); None if there is no such publication."""
    with translated("looking up the publication"):
        row = connection.execute(
            "SELECT puballtables, ARRAY(SELECT tablename::text FROM pg_publication_tables"
            " WHERE pubname = %(publication)s AND schemaname = 'cdc_outbox')"
            " FROM pg_publication WHERE pubname = %(publication)s",
            {"publication": publication},
        ).fetchone()
    if row is None:
        return None
    for_all_tables, listed = row
    return set(_HEARD_TABLES) if for_all_tables else set(listed)


def _begin_script(connection: Connection, target: Target, *, table_is_made: bool, has_waited: bool = True) -> str:
    """What is noted of a slot at once. ``has_waited``: for the transactions that were open, as its making does; else an
    outbox that seems to be empty may not be.
    """
    outbox = _outbox_identifier(connection, target, [], table_is_made=table_is_made)
    may_read = has_waited
    if has_waited and not table_is_made:
        with translated(f"looking up rights to {target.table}"):
            # row security may hide rows: then it cannot be told whether there are any
            row = connection.execute(
                "SELECT has_table_privilege(oid, 'SELECT') AND NOT relrowsecurity FROM pg_class"
                " WHERE oid = %s::regclass",
                [outbox.as_string()],
            ).fetchone()
        may_read = row == (True,)
    begin = settlement.begin_sql(server_major(connection), target.slot, target.publication, outbox, may_read=may_read)
    return f"{begin.as_string(connection)}\n{continuity.begin_sql(target.slot).as_string(connection)}"


def _is_noted(connection: Connection, slot: str) -> bool:
    with translated("looking up what is noted of the slot"):
        if connection.execute("SELECT to_regclass('cdc_outbox.confirmation')").fetchone() == (None,):
            return False
        return connection.execute("SELECT FROM cdc_outbox.confirmation WHERE slot = %s", [slot]).rowcount == 1


def _view_steps(connection: Connection, target: Target, *, table_is_made: bool) -> list[Step]:
    """Enter this outbox for its slot and create the view again, unless it shows the outboxes as they are.

    Raises OperatorNeeded.
    """
    table = None if table_is_made else find_table(connection, target.table)
    resolved = target.columns.of(table.columns if table else ())
    columns = [resolved[field] for field in ("id", "aggregate_id", "event_type")]
    outbox = _outbox_identifier(connection, target, columns, table_is_made=table_is_made)
    with translated("looking up view cdc_outbox.event_status"):
        is_made = connection.execute("SELECT to_regclass('cdc_outbox.event_status') IS NOT NULL").fetchone() == (True,)
        if is_made:
            entered = connection.execute(
                "SELECT FROM cdc_outbox.outbox WHERE (slot, outbox, id, aggregate_id, event_type)"
                " = (%s, to_regclass(%s), %s, %s, %s) AND (SELECT body FROM cdc_outbox.event_status_now())"
                " = (SELECT prosrc FROM pg_proc WHERE oid = to_regproc('cdc_outbox.event_status_rows'))",
                [target.slot, outbox.as_string(), *columns],
            )
            if entered.rowcount:
                return []
    script = sql.SQL(
        """INSERT INTO cdc_outbox.outbox (slot, outbox, id, aggregate_id, event_type) VALUES ({}, {}, {}, {}, {})
    ON CONFLICT (slot) DO UPDATE SET (outbox, id, aggregate_id, event_type)
     = (excluded.outbox, excluded.id, excluded.aggregate_id, excluded.event_type);
CALL cdc_outbox.make_event_status();"""
    ).format(target.slot, outbox.as_string(), *columns)
    return [Step("make view cdc_outbox.event_status", script.as_string(connection))]


def _publication_script(connection: Connection, target: Target, *, table_is_made: bool) -> str:
    """For a publication that no file makes. Raises OperatorNeeded if its table neither exists nor is being made."""
    table = _outbox_identifier(connection, target, [], table_is_made=table_is_made)
    create = sql.SQL("CREATE PUBLICATION {} FOR TABLE {} WITH (publish = 'insert', publish_via_partition_root);")
    tables = [table, *(sql.Identifier("cdc_outbox", name) for name in _HEARD_TABLES)]
    return create.format(sql.Identifier(target.publication), sql.SQL(", ").join(tables)).as_string(connection)


def _outbox_identifier(
    connection: Connection, target: Target, columns: Sequence[str], *, table_is_made: bool
) -> sql.Identifier:
    """The outbox, there or about to be made. Raises OperatorNeeded if it is neither, or lacks one of ``columns``."""
    if table_is_made:
        return sql.Identifier("public", "outbox")
    table = find_table(connection, target.table)
    for column in columns:
        if column not in table.columns:
            raise OperatorNeeded(f"table {table} has no column {column!r}", hint="map yours with outbox.columns")
    return table.identifier


def _script(connection: Connection, migration: Migration) -> str:
    record = sql.SQL("INSERT INTO cdc_outbox.schema_migration (name, sha256) VALUES ({}, {})").format(
        migration.name, migration.sha256
    )
    return f"BEGIN;\n\n{migration.text}\n{record.as_string(connection)};\n\nCOMMIT;"


def _status_of(migration: Migration, applied: tuple[str, datetime] | None, target: Target) -> Status:
    if applied is None:
        return Status(migration.name, "pending" if migration.applies_to(target) else "not needed")
    sha256, applied_at = applied
    return Status(migration.name, "applied" if sha256 == migration.sha256 else "changed", applied_at)


def _applied(connection: Connection) -> dict[str, tuple[str, datetime]]:
    with translated("reading cdc_outbox.schema_migration", granting(connection, READER)):
        if connection.execute("SELECT to_regclass('cdc_outbox.schema_migration')").fetchone() == (None,):
            return {}
        rows = connection.execute("SELECT name, sha256, applied_at FROM cdc_outbox.schema_migration").fetchall()
    return {name: (sha256, applied_at) for name, sha256, applied_at in rows}


@contextmanager
def _advisory_lock(connection: Connection) -> Iterator[None]:
    with translated("waiting for another migration to end"):
        connection.execute("SELECT pg_advisory_lock(%s)", [_ADVISORY_LOCK])
    try:
        yield
    finally:
        with suppress(psycopg.Error):  # after a failure the transaction is broken; closing the connection unlocks too
            connection.execute("SELECT pg_advisory_unlock(%s)", [_ADVISORY_LOCK])
