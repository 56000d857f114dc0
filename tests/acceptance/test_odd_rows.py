"""Rows that can be committed and hardly be carried, from outside: the way out for them never fails on the row."""

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from acceptance.conftest import StartRelay
from cdc_outbox.demo.relay import RelayProcess
from cdc_outbox.wal.encodings import _CODECS
from support import command
from support.relays import CheckedRelay
from support.waiting import wait_until
from support.world import World, create_topic, headers_of, make_world


def lenient(world: World) -> World:
    world.settings["CDC_OUTBOX_RELAY__ON_POISON"] = "dead-letter"
    world.migrate()
    return world


@pytest.fixture(params=["default", "15"])
def server(request: pytest.FixtureRequest) -> str:
    dsn: str = (
        request.getfixturevalue("postgres")
        if request.param == "default"
        else request.getfixturevalue("other_postgres")(request.param)
    )
    return dsn


@pytest.fixture
def latin1_world(server: str, kafka: str) -> Iterator[World]:
    with make_world(server, kafka, encoding="LATIN1") as world:
        yield lenient(world)


@pytest.fixture
def relay(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RelayProcess]:
    world: World = request.getfixturevalue("latin1_world")
    with run(world, tmp_path) as process:
        yield process


def run(world: World, folder: Path) -> RelayProcess:
    environment = {name: value for name, value in world.environment.items() if name != "CDC_OUTBOX_HTTP__LISTEN"}
    return CheckedRelay(environment, folder / "relay.log")


def dead_letters(world: World) -> list[dict[str, Any]]:
    listed = json.loads(command.run(world.environment, "dead-letters", "list", "--json").out)
    return [
        json.loads(command.run(world.environment, "dead-letters", "show", str(letter["id"]), "--json").out)
        for letter in listed
    ]


def small_topic(world: World) -> str:
    """A type whose topic takes 3,000 bytes."""
    aggregate_type = f"{world.name}_small"
    create_topic(world.bootstrap_servers, f"outbox.{aggregate_type}", partitions=1, **{"max.message.bytes": "3000"})
    return aggregate_type


@pytest.mark.rest
def test_headers_that_the_database_cannot_write(latin1_world: World, tmp_path: Path) -> None:
    r"""\u20ac is in JSON's text, and in no LATIN1."""
    world = latin1_world
    small, aggregate_type = small_topic(world), world.create_topic()
    headers = r'{"price": "5 \u20ac", "name": "grün"}'
    bad = world.insert(small, payload=json.dumps({"x": os.urandom(3000).hex()}), headers=headers)
    good = world.insert(aggregate_type, "größe", payload='{"ß": 1}', headers=headers)
    with run(world, tmp_path):
        world.wait_until_confirmed()
        (letter,) = dead_letters(world)
        assert letter["event_id"] == bad
        assert letter["headers"][-2:] == [["price", "5 €"], ["name", "grün"]]
        message, *_ = world.read(aggregate_type, 1)  # sent twice, perhaps: the refusal came after it
        assert (message.key(), message.value()) == ("größe".encode(), '{"ß": 1}'.encode())
        assert headers_of(message) == [("id", good), ("type", "tested"), ("price", "5 €"), ("name", "grün")]
        topic = f"outbox.{aggregate_type}"
        assert command.run(world.environment, "dead-letters", "redrive", str(letter["id"]), "--topic", topic).out
        world.wait_until_confirmed()
        again = world.read(aggregate_type, 2)
        assert [headers_of(message)[2] for message in again if headers_of(message)[0] == ("id", bad)] == [
            ("price", "5 €")
        ]


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "WIN1252"])
@pytest.mark.rest
def test_a_byte_that_is_no_text(kafka: str, server: str, tmp_path: Path, encoding: str) -> None:
    """In any column."""
    stored = "convert_from('\\x7b2278223a228190227d'::bytea, getdatabaseencoding()::name)"
    with make_world(server, kafka, encoding=encoding) as world:
        lenient(world)
        aggregate_type = world.create_topic()
        row = {
            "aggregate_type": aggregate_type,
            "aggregate_id": "a",
            "event_type": "t",
            "payload": "{}",
            "headers": "{}",
        }
        good = [world.insert(aggregate_type)]
        bad = []
        for column in row:
            bad.append(str(uuid.uuid4()))
            value = stored + ("::json" if column in ("payload", "headers") else "")
            values = ", ".join(value if name == column else "%s" for name in row)
            world.db.execute(
                f"INSERT INTO outbox (id, {', '.join(row)}) VALUES (%s, {values})",
                [bad[-1], *(value for name, value in row.items() if name != column)],
            )
            good.append(world.insert(aggregate_type, payload='{"ä": 1}'))
        with run(world, tmp_path) as relay:
            world.wait_until_confirmed()
            letters = dead_letters(world)
            assert [(letter["event_id"], letter["reason"]) for letter in letters] == [
                (id_, "undecodable") for id_ in bad
            ]
            delivered = [dict(headers_of(message))["id"] for message in world.read(aggregate_type, len(good))]
            assert delivered == good
            assert not relay.ended
        world.db.execute("ALTER TABLE outbox DROP created_at, ADD created_at bigint DEFAULT 0")
        world.db.execute(f"INSERT INTO outbox (event_type, aggregate_id, payload) VALUES ('t', {stored}, '{{}}')")
        for verb in ("status", "migrate status", "dead-letters list", "status --stuck 0s"):
            assert command.run(world.environment, *verb.split()).exit_code == 0, verb


@pytest.mark.rest
def test_a_standby_of_a_database_that_is_not_in_utf8(kafka: str, server: str, tmp_path: Path) -> None:
    with make_world(server, kafka, encoding="LATIN1") as world:
        world.settings["CDC_OUTBOX_POSTGRES__PUBLICATION"] = "größe"
        world.settings["CDC_OUTBOX_CANARY__TOPIC"] = f"{world.name}-canary"
        world.migrate(publication="größe")
        aggregate_type = world.create_topic()
        (tmp_path / "second").mkdir()
        with ExitStack() as stack:
            leader = stack.enter_context(run(world, tmp_path))
            leader.wait_until_ready()
            standby = stack.enter_context(run(world, tmp_path / "second"))
            wait_until(lambda: (standby.readyz() or {}).get("state") == "standby", "it stands by")
            asked: set[object] = set()

            def asks_again_and_again() -> bool:
                asked.update(
                    world.db.execute(
                        "SELECT query_start FROM pg_stat_activity WHERE datname = %s AND backend_type = 'walsender'"
                        " AND pid NOT IN (SELECT active_pid FROM pg_replication_slots WHERE active_pid IS NOT NULL)",
                        [world.name],
                    ).fetchall()
                )
                return len(asked) > 3

            wait_until(asks_again_and_again, "the standby asks again and again")
            leader.process.terminate()
            assert leader.process.wait(20) == 0
            standby.wait_until_ready()
            event_id = world.insert(aggregate_type, "grün")
            (message,) = world.read(aggregate_type, 1)
            assert dict(headers_of(message))["id"] == event_id
        world.settings["CDC_OUTBOX_KAFKA__TOPIC"] = f"outbox.{aggregate_type}"  # not those of other tests
        assert "round trip: a canary was in" in command.run(world.environment, "doctor").out


@pytest.mark.rest
def test_a_dead_letter_with_a_key_that_is_no_text_wants_another(kafka: str, server: str, tmp_path: Path) -> None:
    with make_world(server, kafka, encoding="SQL_ASCII") as world:
        lenient(world)
        aggregate_type = world.create_topic()
        world.db.execute(
            "INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload)"
            " VALUES (%s, convert_from('\\x636166e9', 'SQL_ASCII'), 't', '{}')",
            [aggregate_type],
        )
        with run(world, tmp_path):
            world.wait_until_confirmed()
            done = command.run(world.environment, "dead-letters", "redrive", "1")
            assert (done.exit_code, "give one with --key" in done.error) == (2, True)
            assert command.run(world.environment, "dead-letters", "redrive", "1", "--key", "café").exit_code == 0
            (message,) = world.read(aggregate_type, 1)
            assert message.key() == "café".encode()


def test_an_id_of_any_length(world: World, start_relay: StartRelay) -> None:
    world.settings["CDC_OUTBOX_RELAY__ON_POISON"] = "dead-letter"
    world.db.execute(
        "CREATE TABLE outbox (id text, aggregate_type text, aggregate_id text, event_type text, payload json)"
    )
    world.migrate()
    start_relay()
    event_id = os.urandom(30_000).hex()
    world.insert("no topic", id=event_id)
    world.wait_until_confirmed()
    (letter,) = dead_letters(world)
    assert letter["event_id"] == event_id


def test_conversion_is_that_of_the_server(postgres: str) -> None:
    """For every byte of every encoding that we convert ourselves; of EUC_CN, every pair that is a character."""
    pairs = [bytes([first, second]) for first in range(0xA1, 0xFF) for second in range(0xA1, 0xFF)]
    characters = {pair: text for pair in pairs if (text := pair.decode("gb2312", errors="ignore"))}
    with psycopg.connect(postgres, autocommit=True) as connection:
        theirs_of = connection.execute(
            "SELECT convert_from(pair, 'EUC_CN') FROM unnest(%s::bytea[]) WITH ORDINALITY AS of (pair, n) ORDER BY n",
            [list(characters)],
        ).fetchall()
    assert [text for (text,) in theirs_of] == list(characters.values())
    with psycopg.connect(postgres, autocommit=True) as connection:
        for encoding, codec in _CODECS.items():
            if encoding == "SQL_ASCII":
                continue
            for byte in range(1, 256):
                try:
                    ours: str | None = bytes([byte]).decode(codec)
                except UnicodeDecodeError:
                    ours = None
                try:
                    theirs = connection.execute("SELECT convert_from(%s, %s)", [bytes([byte]), encoding]).fetchone()
                except psycopg.DataError:
                    theirs = (None,)
                assert theirs == (ours,), (encoding, byte)


def test_what_data_says_stays_on_one_line(world: World) -> None:
    world.migrate()
    aggregate = "line\nbreak \x1b[31m" + "x" * 10_000
    world.insert("no topic", aggregate)
    done = command.run(world.environment, "run")
    assert done.exit_code == 3
    assert "aggregate 'line\\nbreak \\x1b[31mxxx" in done.error
    assert len(done.error) < 1500


@pytest.mark.rest
def test_a_large_event_is_kept_whole(world: World, start_relay: StartRelay) -> None:
    """In the time that it takes, and the slot is held meanwhile."""
    world = lenient(world)
    aggregate_type = world.create_topic()
    size = 150_000_000
    world.db.execute("ALTER TABLE outbox ALTER payload TYPE text")
    world.db.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload) VALUES (%s, 'a', 't', repeat('x', %s))",
        [aggregate_type, size],
    )
    start_relay()
    good = world.insert(aggregate_type)
    world.wait_until_confirmed(timeout_seconds=60)
    row = world.db.execute("SELECT reason, octet_length(payload) FROM cdc_outbox.parked").fetchall()
    assert row == [("MSG_SIZE_TOO_LARGE", size)]
    assert [dict(headers_of(message))["id"] for message in world.read(aggregate_type, 1)] == [good]
    began = time.monotonic()
    shown = command.run(world.environment, "dead-letters", "show", "1")
    assert time.monotonic() - began < 15
    assert "x" * size in shown.out


@pytest.mark.parametrize("name", ["we%sird", 'a\\b"c', "{x}'[/y]"])
@pytest.mark.rest
def test_names_may_hold_anything(world: World, start_relay: StartRelay, name: str) -> None:
    table, column = sql.Identifier(name, name), sql.Identifier(name)
    world.db.execute(sql.SQL("CREATE SCHEMA {}").format(column))
    world.db.execute(
        sql.SQL(
            "CREATE TABLE {} ({} uuid DEFAULT gen_random_uuid(), aggregate_id text, event_type text, payload json,"
            " at timestamptz NOT NULL) PARTITION BY RANGE (at)"
        ).format(table, column)
    )
    for start, end in (("-infinity", "2020-01-01"), ("2020-01-01", "infinity")):
        partition = sql.Identifier(name, f"{name} {end}")
        world.db.execute(
            sql.SQL("CREATE TABLE {} PARTITION OF {} FOR VALUES FROM ({}) TO ({})").format(partition, table, start, end)
        )
    world.settings.update(
        CDC_OUTBOX_OUTBOX__TABLE=table.as_string(),
        CDC_OUTBOX_OUTBOX__COLUMNS__ID=json.dumps([name]),
        CDC_OUTBOX_POSTGRES__PUBLICATION=name,
        CDC_OUTBOX_KAFKA__TOPIC=f"{world.name}.event",
        CDC_OUTBOX_KAFKA__CREATE_TOPICS="true",
        CDC_OUTBOX_RELAY__ON_POISON="dead-letter",
        CDC_OUTBOX_CANARY__TOPIC=f"{world.name}.canary",
    )

    def verb(*arguments: str) -> command.Done:
        done = command.run(world.environment, *arguments)
        assert (done.exit_code, "Traceback" in done.err) == (0, False), done
        return done

    verb("migrate", "up")
    assert verb("migrate", "up").out == "nothing to do\n"
    start_relay()
    for at in ("2019-01-01", "2021-01-01"):
        world.db.execute(sql.SQL("INSERT INTO {} VALUES (DEFAULT, 'a', 't', '{{}}', {})").format(table, at))
    world.db.execute(sql.SQL("INSERT INTO {} VALUES (DEFAULT, NULL, 't', '{{}}', '2021-01-01')").format(table))
    world.wait_until_confirmed()
    for arguments in ("status", "status --stuck 0s", "dead-letters list", "dead-letters show 1", "doctor"):
        verb(*arguments.split())
    wait_until(lambda: "1 rows pruned" in verb("prune", "--older-than", "0s").out, "the old partition is dropped")
