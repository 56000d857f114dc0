"""What a database or a role may say of a session (ALTER ... SET) changes nothing of what we do."""

import json
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from acceptance.conftest import StartRelay
from cdc_outbox.postgres.connection import connect
from support import command
from support.observing import readyz
from support.waiting import wait_until
from support.world import World

#: Of each kind of setting that a user may change and that statements depend on, the value that would hurt.
WHIMS = {
    "DateStyle": "German",
    "IntervalStyle": "sql_standard",
    "TimeZone": "Asia/Kathmandu",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "client_min_messages": "error",
    "client_encoding": "LATIN1",
    "search_path": "nowhere",
    "standard_conforming_strings": "off",
    "escape_string_warning": "on",
    "array_nulls": "off",
    "quote_all_identifiers": "on",
    "transform_null_equals": "on",
    "row_security": "off",
    "exit_on_error": "on",
    "lc_messages": "C",
    "synchronous_commit": "off",
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "default_transaction_deferrable": "on",
    "statement_timeout": "300ms",
    "lock_timeout": "1ms",
    "idle_in_transaction_session_timeout": "300ms",
    "idle_session_timeout": "500ms",
    "transaction_timeout": "1s",
    "wal_sender_timeout": "1s",
    "restrict_nonsystem_relation_kind": "view, foreign-table",
    "plpgsql.extra_errors": "all",
    "xmlbinary": "hex",
    "jit_above_cost": "0",
    "enable_indexscan": "off",
    "enable_seqscan": "off",
    "work_mem": "64kB",
    "default_statistics_target": "1",
}


def set_whims(world: World) -> None:
    """On the database, those that this version has."""
    for name, value in WHIMS.items():
        statement = sql.SQL("ALTER DATABASE {} SET {} = {}").format(
            sql.Identifier(world.name), sql.SQL(name), sql.Literal(value) if name != "search_path" else sql.SQL(value)
        )
        try:
            world.db.execute(statement)
        except psycopg.errors.UndefinedObject:
            assert name in ("transaction_timeout", "restrict_nonsystem_relation_kind"), "all others are older than 14"


@pytest.mark.rest
def test_a_database_full_of_whims(every_world: World, start_relay: StartRelay, tmp_path: Path) -> None:
    world = every_world
    set_whims(world)
    world.settings.update(
        CDC_OUTBOX_RELAY__ON_POISON="dead-letter",
        CDC_OUTBOX_CANARY__EVERY_SECONDS="0.2",
        CDC_OUTBOX_CANARY__TOPIC=f"{world.name}.canary",
        CDC_OUTBOX_KAFKA__TOPIC=f"{world.name}.{{aggregate_type}}",
        CDC_OUTBOX_KAFKA__CREATE_TOPICS="true",
    )

    def verb(*arguments: str) -> command.Done:
        done = command.run(world.environment, *arguments)
        assert done.exit_code == 0, done
        return done

    verb("migrate", "up")
    assert verb("migrate", "up").out == "nothing to do\n"
    relay = start_relay()
    good, bad = world.insert("event"), world.insert("no topic")
    world.wait_until_confirmed()
    (letter,) = json.loads(verb("dead-letters", "list", "--json").out)
    assert letter["event_id"] == bad
    verb("dead-letters", "redrive", str(letter["id"]), "--topic", f"{world.name}.event")
    wait_until(lambda: verb("dead-letters", "list").out.startswith("no dead letters"), "it is redriven")
    assert json.loads(verb("status", "--stuck", "0s", "--json").out)["unknown"] == 0

    def is_published() -> bool:
        row = world.db.execute(
            "SELECT published FROM cdc_outbox.event_status WHERE outbox_id::text = %s", [good]
        ).fetchone()
        return row == (True,)

    wait_until(is_published, "its row is told as published")
    assert verb("prune", "--older-than", "0s").out.startswith("2 rows pruned")
    verb("status")
    verb("migrate", "status")
    checks = json.loads(command.run(world.environment, "doctor", "--json").out)["findings"]
    assert [check for check in checks if check["state"] == "failed"] == []
    assert checks[-1]["check"] == "round trip"
    assert checks[-1]["state"] == "ok"
    wait_until(sessions_are_old(world, seconds=3), "no session of ours is cut off", timeout_seconds=10)
    assert relay.metric('cdc_outbox_reconnects_total{side="postgres"}') == 0
    assert readyz(relay)["last_errors"] == []


def sessions_are_old(world: World, *, seconds: int) -> Callable[[], bool]:
    """Stream, state and monitor have lasted so long that every timeout would have hit them."""

    def are_old() -> bool:
        rows = world.db.execute(
            "SELECT application_name FROM pg_stat_activity WHERE datname = %s AND application_name LIKE 'cdc-outbox%%'"
            " AND backend_start < clock_timestamp() - make_interval(secs => %s)",
            [world.name, seconds],
        ).fetchall()
        return {name for (name,) in rows} >= {"cdc-outbox", "cdc-outbox state", "cdc-outbox monitor"}

    return are_old


@pytest.mark.rest
def test_a_long_transaction_is_decoded_whatever_time_sessions_may_take(
    old_and_new_world: World, start_relay: StartRelay
) -> None:
    """The walsender is one session with one long command."""
    world = old_and_new_world
    world.migrate()
    set_whims(world)
    aggregate_type = world.create_topic()
    world.db.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload)"
        " SELECT %s, n::text, 'tested', json_build_object('n', repeat('x', 300)) FROM generate_series(1, 300000) AS n",
        [aggregate_type],
    )
    relay = start_relay()
    world.wait_until_confirmed(timeout_seconds=60)
    assert relay.metric('cdc_outbox_reconnects_total{side="postgres"}') == 0


def test_a_database_that_becomes_read_only_is_waited_for(world: World) -> None:
    """SQLSTATE 25006, as from a server that has become a standby: another connection finds the primary."""
    from cdc_outbox.errors import SourceUnavailable
    from cdc_outbox.postgres.connection import translated

    with connect(world.dsn) as connection, pytest.raises(SourceUnavailable), translated("writing"):
        connection.execute("BEGIN READ ONLY; CREATE TABLE t ()")


def test_what_a_service_file_says_counts(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over our defaults, under the DSN."""
    service = tmp_path / "pg_service.conf"
    service.write_text("[app]\nconnect_timeout=3\ntarget_session_attrs=read-write\nkeepalives_idle=77\n")
    monkeypatch.setenv("PGSERVICEFILE", str(service))
    with connect(f"{world.dsn} service=app keepalives_idle=78") as connection:
        said = {option.keyword.decode(): option.val for option in connection.pgconn.info}
    assert (said["connect_timeout"], said["target_session_attrs"]) == (b"3", b"read-write")
    assert (said["keepalives_idle"], said["keepalives_count"]) == (b"78", b"4")
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "4")
    with connect(world.dsn) as connection:
        said = {option.keyword.decode(): option.val for option in connection.pgconn.info}
    assert said["connect_timeout"] == b"4"
