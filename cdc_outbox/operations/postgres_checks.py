"""What `doctor` checks of PostgreSQL: server, publication, slot, role and connection.

What `run` itself insists on lies in `catalog` and is asked there; here is what only people need to know. Reads system
views; changes nothing.
Source: PostgreSQL manual, "Replication" (settings), "pg_replication_slots", "pg_stat_replication", "Role Attributes".
"""

import time
from collections.abc import Callable
from typing import Any, Final

import orjson
from psycopg import sql

from cdc_outbox.errors import CdcOutboxError
from cdc_outbox.journal.coverage import sent_heaps
from cdc_outbox.operations.findings import Finding, Findings, checked
from cdc_outbox.postgres import catalog
from cdc_outbox.postgres.catalog import Table
from cdc_outbox.postgres.connection import Connection, translated
from cdc_outbox.postgres.publication import SentTable, unrouted, wasteful
from cdc_outbox.postgres.server import check_same_server
from cdc_outbox.postgres.slots import check_slot, find_slot
from cdc_outbox.postgres.stream import ReplicationStream

_IDLE_TIMEOUT_SINCE: Final = 18
_MOST_CLOCK_SECONDS: Final = 1.0
#: By major version, the first in which an open transaction does not hide what others change in a publication
#: (release notes: "Distribute invalidation messages to all in-progress transactions" in logical decoding).
_LEAST_MINOR: Final = {14: 140_018, 15: 150_013, 16: 160_009, 17: 170_005}
#: What the relay needs in its own schema: table, and rights to it.
_STATE_RIGHTS: Final = {
    "parked": "SELECT, INSERT, UPDATE",
    "outcome": "SELECT, INSERT",
    "policy": "SELECT, INSERT",
    "confirmation": "SELECT, INSERT, UPDATE",
    "settled": "SELECT, INSERT, DELETE",
    "coverage": "SELECT, INSERT, DELETE",
    "canary": "SELECT, INSERT, DELETE",
}


def server_findings(connection: Connection, slot: str) -> Findings:
    """Version, settings, and whether there is room for the slot and its walsender."""

    def version() -> str:
        catalog.check_server(connection)
        return f"PostgreSQL {connection.info.parameter_status('server_version')}, wal_level logical"

    yield checked("server", version)
    least = _LEAST_MINOR.get(catalog.server_major(connection), 0)
    if connection.info.server_version < least:
        yield Finding(
            "server's bugs",
            "warning",
            f"before {least // 10_000}.{least % 10_000} PostgreSQL may send nothing of a table that comes into a "
            "publication while a transaction is open that began before",
            "upgrade to the latest minor version",
        )
    rows = _rows(
        connection,
        "reading settings",
        "SELECT name, setting FROM pg_settings WHERE name IN ('max_replication_slots', 'max_wal_senders',"
        " 'max_slot_wal_keep_size', 'idle_replication_slot_timeout')",
    )
    settings = dict(rows)
    yield _free_slots(connection, slot, int(settings["max_replication_slots"]))
    yield _free_walsenders(connection, int(settings["max_wal_senders"]))
    yield _wal_limit(int(settings["max_slot_wal_keep_size"]))
    if catalog.server_major(connection) >= _IDLE_TIMEOUT_SINCE:
        yield _idle_timeout(int(settings["idle_replication_slot_timeout"]))


def _free_slots(connection: Connection, slot: str, most: int) -> Finding:
    used, is_there = _row(
        connection,
        "counting slots",
        "SELECT count(*), coalesce(bool_or(slot_name = %s), false) FROM pg_replication_slots",
        [slot],
    )
    found = f"{used} of {most} replication slots are used"
    if used >= most and not is_there:
        hint = f"ALTER SYSTEM SET max_replication_slots = {most + 4}, and restart PostgreSQL"
        return Finding("free slots", "failed", f"{found}, and {slot!r} is not among them", hint)
    return Finding("free slots", "ok", found)


def _free_walsenders(connection: Connection, most: int) -> Finding:
    (used,) = _row(connection, "counting walsenders", "SELECT count(*) FROM pg_stat_replication")
    found = f"{used} of {most} walsenders are used"
    if used >= most:  # a standby needs one of its own while it waits
        return Finding(
            "free walsenders", "failed", found, f"ALTER SYSTEM SET max_wal_senders = {most + 4}, and restart PostgreSQL"
        )
    return Finding("free walsenders", "ok", found)


def _wal_limit(megabytes: int) -> Finding:
    if megabytes < 0:
        return Finding(
            "WAL kept for slots",
            "warning",
            "max_slot_wal_keep_size is unlimited: a slot that nobody reads fills the disk",
            "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB' (well below the disk's size); SELECT pg_reload_conf()",
        )
    return Finding("WAL kept for slots", "ok", f"at most {megabytes} MB (max_slot_wal_keep_size)")


def _idle_timeout(seconds: int) -> Finding:
    if seconds:
        return Finding(
            "idle slots",
            "warning",
            f"idle_replication_slot_timeout is {seconds} s: a relay that is away for longer loses its slot, and events",
            "ALTER SYSTEM SET idle_replication_slot_timeout = 0; SELECT pg_reload_conf()",
        )
    return Finding("idle slots", "ok", "are kept (idle_replication_slot_timeout is 0)")


def publication_findings(connection: Connection, check: Callable[[], SentTable], slot: str) -> Findings:
    """What is sent of the outbox, as ``check`` says, and whether what the slot has yet to read may be older than it."""
    try:
        sent = check()
    except CdcOutboxError as error:
        yield Finding("publication", "failed", error.message, error.hint)
        return
    publication = sent.publication
    yield Finding("publication", "ok", f"{publication.name!r} sends every row of {sent.table}, and the columns wanted")
    for waste in wasteful(publication):
        hint = f"ALTER PUBLICATION {publication.identifier} SET (publish = 'insert')"
        yield Finding("publication", "warning", waste, hint)
    if others := unrouted(connection, sent):
        yield Finding(
            "other tables",
            "warning",
            f"{publication.name!r} lists {', '.join(others)} besides: the first row of one ends the relay",
            f"if they hold no events: outbox.ignore_tables = {orjson.dumps(others).decode()}",
        )
    yield from _publication_age(connection, sent, slot)
    yield from _updates(connection, sent, slot)
    yield from _partitioning(connection, sent)


def _publication_age(connection: Connection, sent: SentTable, slot: str) -> Findings:
    """Rows that are older than what is sent today may not come, and PostgreSQL 18 says nothing."""
    check, name = "publication's age", sent.publication.name
    try:
        with translated("comparing publication and slot"):
            is_older = connection.execute(
                sql.SQL(
                    "SELECT FROM ({}) AS sent JOIN cdc_outbox.coverage USING (heap, fingerprint)"
                    " JOIN cdc_outbox.settled ON settled.coverage = coverage.id"
                    " JOIN pg_replication_slots ON slot_name = slot AND lsn <= confirmed_flush_lsn WHERE slot = {}"
                ).format(sent_heaps(catalog.server_major(connection), name, sql.Literal(sent.table.oid)), slot)
            ).rowcount
    except CdcOutboxError as error:  # no schema cdc_outbox, or no right to it: said elsewhere
        yield Finding(check, "warning", f"cannot be told: {error.message}", error.hint)
        return
    if is_older:
        yield Finding(check, "ok", "older than what the slot has yet to read")
    elif find_slot(connection, slot):
        yield Finding(
            check,
            "warning",
            f"what {name!r} sends of {sent.table} was changed after what slot {slot!r} has confirmed: rows from before "
            "that may not come, and count as unknown",
            "let the relay catch up; then see: SELECT * FROM cdc_outbox.event_status WHERE state = 'unknown'",
        )


def _updates(connection: Connection, sent: SentTable, slot: str) -> Findings:
    """Where rows may be there that were never sent, each update makes it unknown what became of what."""
    try:
        with translated("looking at what is told of rows"):
            rows = connection.execute(
                sql.SQL(
                    "SELECT heap::oid::regclass::text FROM ({}) AS sent"
                    " WHERE heap <> ALL (SELECT heap FROM cdc_outbox.coverage WHERE id ="
                    "   (SELECT coverage FROM cdc_outbox.settled WHERE slot = {}"
                    "     ORDER BY pg_snapshot_xmax(snapshot) DESC, id DESC LIMIT 1))"
                    " UNION"
                    " SELECT heap::regclass::text FROM cdc_outbox.settled"
                    "   JOIN cdc_outbox.coverage ON coverage.id = settled.coverage"
                    "  WHERE slot = {} AND settled_at > now() - interval '1 hour' AND NOT complete"
                    "  GROUP BY heap HAVING count(DISTINCT updates) > 1"
                ).format(
                    sent_heaps(catalog.server_major(connection), sent.publication.name, sql.Literal(sent.table.oid)),
                    slot,
                    slot,
                )
            ).fetchall()
    except CdcOutboxError:  # no schema cdc_outbox, or no right to it: said elsewhere
        return
    for (heap,) in rows:
        yield Finding(
            "updates",
            "warning",
            f"of rows of {heap} it cannot always be told whether they were published: rows are updated there, and an "
            "update could pass one that was never sent for a new one; or the relay has yet to look what is sent",
            f"do not update {sent.table}: keep what changes in another table",
        )


def _partitioning(connection: Connection, sent: SentTable) -> Findings:
    rows = _rows(
        connection,
        "looking at the partitioning",
        "SELECT FROM pg_partitioned_table WHERE partrelid = ANY(%s) AND partstrat = 'l'",
        [list(sent.oids)],
    )
    if rows:
        yield Finding(
            "partitioning",
            "warning",
            f"{sent.table} is partitioned by LIST: an UPDATE that moves a row to another partition sends it again",
            "never change the column that it is partitioned by; partition by time instead",
        )


def slot_findings(connection: Connection, slot: str) -> Findings:
    """Whether it can be streamed from, how it stands, and who holds it."""
    try:
        found = check_slot(connection, slot)
    except CdcOutboxError as error:
        yield Finding("slot", "failed", error.message, error.hint)
        return
    stands = f"{slot!r} is {found.wal_status}, confirmed to {found.confirmed_lsn}"
    yield Finding("slot", "ok", f"{stands}, held by {_holder(connection, slot)}")
    if found.wal_status == "unreserved":
        yield Finding(
            "slot's WAL",
            "failed",
            f"slot {slot!r} is unreserved: it is lost at the next checkpoint unless the relay catches up",
            "start the relay now, or raise max_slot_wal_keep_size and SELECT pg_reload_conf()",
        )
    if found.failover is False and _standbys(connection):
        yield Finding(
            "slot's failover",
            "warning",
            f"there are standbys, but slot {slot!r} does not go with a failover",
            "stop the relay, then on a connection with replication=database: "
            f"ALTER_REPLICATION_SLOT {slot} (FAILOVER true)",
        )


def _holder(connection: Connection, slot: str) -> str:
    rows = _rows(
        connection,
        "looking up who holds the slot",
        "SELECT pid, coalesce(application_name, 'another role'), coalesce(host(client_addr), 'an address not shown')"
        " FROM pg_stat_replication JOIN pg_replication_slots ON active_pid = pid WHERE slot_name = %s",
        [slot],
    )
    return f"{rows[0][1]} from {rows[0][2]} (walsender {rows[0][0]})" if rows else "nobody"


def _standbys(connection: Connection) -> int:
    (count,) = _row(
        connection,
        "looking for standbys",
        "SELECT count(*) FROM pg_stat_replication WHERE state IN ('catchup', 'streaming') AND pid NOT IN"
        " (SELECT active_pid FROM pg_replication_slots WHERE slot_type = 'logical' AND active_pid IS NOT NULL)",
    )
    return int(count)


def role_findings(connection: Connection, table: Table) -> Findings:
    """What the role lacks, and what it has beyond its needs."""
    name, is_superuser, can_replicate, more = _row(
        connection,
        "looking up the role",
        "SELECT rolname, rolsuper, rolreplication, array_remove(ARRAY[CASE WHEN rolcreaterole THEN 'CREATEROLE' END,"
        " CASE WHEN rolcreatedb THEN 'CREATEDB' END, CASE WHEN rolbypassrls THEN 'BYPASSRLS' END], NULL)"
        " FROM pg_roles WHERE rolname = current_user",
    )
    quoted = sql.Identifier(name).as_string()
    least = "let the relay connect as cdc_outbox_relay (sql/roles.sql)"
    if is_superuser:
        yield Finding("role", "warning", f"{name} is a superuser: the relay needs REPLICATION only", least)
        yield _relay_schema(connection, quoted)
        return
    if not can_replicate:
        yield Finding(
            "role",
            "warning",
            f"{name} has not REPLICATION itself",
            f"ALTER ROLE {quoted} REPLICATION (or as your provider says)",
        )
    else:
        yield Finding("role", "ok", f"{name} has REPLICATION")
    if more:
        drop = " ".join(f"NO{attribute}" for attribute in more)
        yield Finding("role's excess", "warning", f"{name} has {', '.join(more)}", f"ALTER ROLE {quoted} {drop}")
    yield from _excess_reading(connection, quoted, table)
    yield _relay_schema(connection, quoted)


def _excess_reading(connection: Connection, role: str, table: Table) -> Findings:
    qualified = table.identifier.as_string()
    (reads,) = _row(
        connection,
        "looking up rights to the outbox",
        "SELECT has_table_privilege(c.oid, 'SELECT') FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace"
        " WHERE nspname = %s AND relname = %s",
        [table.namespace, table.name],
    )
    if reads:
        found = f"{role} may SELECT from {table}, which the relay never does"
        hint = f"REVOKE SELECT ON {qualified} FROM {role}"  # noqa: S608 - shown, not run
        yield Finding("role's excess", "warning", found, hint)


def _relay_schema(connection: Connection, role: str) -> Finding:
    """The relay's own tables: there, and the role's to use."""
    check = "relay's schema"
    rights = {name: _has_rights(connection, name, wanted) for name, wanted in _STATE_RIGHTS.items()}
    absent = [name for name, has in rights.items() if has is None]
    if absent:
        found = f"cdc_outbox has no table {', '.join(absent)}: the relay cannot keep its state there"
        return Finding(check, "failed", found, "cdc-outbox migrate up")
    refused = [
        f"GRANT USAGE ON SCHEMA cdc_outbox TO {role}; GRANT {_STATE_RIGHTS[name]} ON cdc_outbox.{name} TO {role}"
        for name, has in rights.items()
        if not has
    ]
    if refused:
        return Finding(check, "failed", f"{role} cannot keep the relay's state", "; ".join(refused))
    return Finding(check, "ok", f"{role} has the rights it needs in cdc_outbox")


def _has_rights(connection: Connection, name: str, rights: str) -> bool | None:
    """To a table of cdc_outbox; None if it is not there."""
    query = (
        "SELECT has_schema_privilege(n.oid, 'USAGE') AND bool_and(has_table_privilege(c.oid, needed))"
        " FROM pg_namespace n JOIN pg_class c ON c.relnamespace = n.oid, unnest(string_to_array(%s, ', ')) AS needed"
        " WHERE nspname = 'cdc_outbox' AND relname = %s GROUP BY n.oid"
    )
    rows = _rows(connection, "looking up rights in cdc_outbox", query, [rights, name])
    return bool(rows[0][0]) if rows else None


def connection_findings(connection: Connection, dsn: str) -> Findings:
    """The way to the server: a pooler in it, the replication connection, the clocks."""
    (backend_pid,) = _row(connection, "asking for the backend", "SELECT pg_backend_pid()")
    if backend_pid != connection.info.backend_pid:
        yield Finding(
            "pooler",
            "failed",
            "something between us and PostgreSQL answers for it (the backend is another than it says)",
            "let postgres.dsn name the server itself: a replication connection cannot be pooled",
        )
    else:
        yield Finding("pooler", "ok", "none in the way")

    def replication() -> str:
        with ReplicationStream(dsn) as stream:
            check_same_server(connection, stream.identify())
        return "allowed (pg_hba.conf, REPLICATION), and to the same server"

    yield checked("replication connection", replication, hint="see pg_hba.conf and max_wal_senders on the server")
    yield clock_finding(connection, time.time)


def clock_finding(connection: Connection, now: Any) -> Finding:
    """``now`` is our clock, Unix seconds. Latencies and the age of events are told from both."""
    asked = now()
    (theirs,) = _row(connection, "asking for the time", "SELECT extract(epoch FROM clock_timestamp())::float8")
    answered = now()
    apart = max(asked - theirs, theirs - answered, 0.0)
    if apart > _MOST_CLOCK_SECONDS:
        found = f"the server's clock and ours are {apart:.1f} s apart: latencies are wrong by as much"
        return Finding("clocks", "warning", found, "let both machines follow a time server (chrony, systemd-timesyncd)")
    return Finding("clocks", "ok", "agree within a second")


def _rows(connection: Connection, what: str, query: str, parameters: list[Any] | None = None) -> list[tuple[Any, ...]]:
    with translated(what):
        return connection.execute(query.encode(), parameters).fetchall()


def _row(connection: Connection, what: str, query: str, parameters: list[Any] | None = None) -> tuple[Any, ...]:
    (row,) = _rows(connection, what, query, parameters)
    return row
