"""`cdc-outbox inbox`: what waits for a person, and how it gets on."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from cdc_outbox.inbox import Message
from cdc_outbox.inbox import schema as inbox_sql
from cdc_outbox.inbox.psycopg import Inbox
from support import command
from support.applications import a_message
from support.world import World


@pytest.fixture
def parked(world: World) -> World:
    """Of `billing` two are parked, with two and none behind them; of `mail` the same message as one of them."""
    world.db.execute(inbox_sql.sql().encode())
    with psycopg.connect(world.dsn) as connection:
        inbox = Inbox("billing")
        park(connection, inbox, a_message("m-1", key="a", topic="orders", value=b'{"n": 1}', headers={"tenant": "t"}))
        inbox.park_followers(
            connection, inbox.once_many(connection, [a_message(f"m-1{n}", key="a", topic="orders") for n in "ab"])
        )
        park(connection, inbox, a_message("m-2", key="b\x1b[31m", topic="orders", value=b"\xff"))
        park(connection, Inbox("mail"), a_message("m-2", key="b", topic="orders"))
    return world


def park(connection: psycopg.Connection[Any], inbox: Inbox, message: Message) -> None:
    inbox.park(connection, message, ValueError("no such account\nat all"))


def rows(world: World, *arguments: str) -> list[dict[str, Any]]:
    done = command.run(world.environment, "inbox", "list", "--json", *arguments)
    assert (done.exit_code, done.err) == (0, "")
    found: list[dict[str, Any]] = json.loads(done.out)
    return found


@contextmanager
def consumer(world: World, *, fails: bool = False) -> Iterator[None]:
    """What a running one does with messages that are due."""
    stop, inbox = threading.Event(), Inbox("billing")

    def run() -> None:
        with psycopg.connect(world.dsn) as connection:
            while not stop.wait(0.02):
                if message := inbox.due(connection):
                    if fails:
                        inbox.park(connection, message, "still not")
                    else:
                        assert inbox.retry(connection, message)
                    connection.commit()

    thread = threading.Thread(target=run)
    thread.start()
    yield
    stop.set()
    thread.join()


def test_a_list(parked: World) -> None:
    found = rows(parked)
    assert [(row["consumer"], row["message_id"], row["state"], row["behind"]) for row in found] == [
        ("billing", "m-1", "parked", 2),
        ("billing", "m-2", "parked", 0),
        ("mail", "m-2", "parked", 0),
    ]
    assert found[0]["key"] == {"text": "a"}
    assert found[0]["error"] == "ValueError: no such account\nat all"
    assert [row["message_id"] for row in rows(parked, "--all", "--consumer", "billing")] == [
        "m-1",
        "m-1a",
        "m-1b",
        "m-2",
    ]
    shown = command.run(parked.environment, "inbox", "list")
    assert shown.exit_code == 0
    assert shown.out.splitlines()[:3] == [
        "m-1  parked (attempts: 1, behind it: 2)",
        "    billing: orders[None]@None, key a",
        "    ValueError: no such account at all",
    ]
    assert "\x1b[31m" not in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    parked.db.execute("TRUNCATE inbox_parked")
    assert command.run(parked.environment, "inbox", "list").out == "nothing is parked\n"


def test_one_message(parked: World) -> None:
    shown = command.run(parked.environment, "inbox", "show", "m-1")
    assert shown.exit_code == 0
    assert '{"n": 1}' in shown.out
    assert "tenant: t" in shown.out
    done = command.run(parked.environment, "inbox", "show", "m-2", "--consumer", "billing", "--json")
    assert json.loads(done.out)["value"] == {"base64": "/w=="}
    several = command.run(parked.environment, "inbox", "show", "m-2")
    assert several.exit_code == 2
    assert "several have message 'm-2': billing, mail -- add --consumer or --source" in several.err
    none = command.run(parked.environment, "inbox", "show", "m-3")
    assert none.exit_code == 2
    assert "no message 'm-3' was ever parked" in none.err


def test_unpark_says_what_became_of_it(parked: World) -> None:
    with consumer(parked):
        done = command.run(parked.environment, "inbox", "unpark", "m-1", "m-2", "--consumer", "billing")
    assert (done.exit_code, done.err) == (0, "")
    assert done.out == "message 'm-1' handled; 2 behind it\nmessage 'm-2' handled\n"
    again = command.run(parked.environment, "inbox", "unpark", "m-1")
    assert again.exit_code == 4
    assert "message 'm-1' was handled already" in again.err


def test_unpark_says_that_it_failed_again(parked: World) -> None:
    with consumer(parked, fails=True):
        done = command.run(parked.environment, "inbox", "unpark", "m-1")
    assert done.exit_code == 4
    assert "message 'm-1' failed again: still not" in done.err


def test_unpark_without_a_consumer(parked: World) -> None:
    done = command.run(parked.environment, "inbox", "unpark", "m-1", "--timeout", "1s")
    assert done.exit_code == 4
    assert "message 'm-1' was not handled in time: does its consumer run? The request stands" in done.err
    again = command.run(parked.environment, "inbox", "unpark", "m-1", "--timeout", "1s")  # waits for the same request
    assert (again.exit_code, again.err) == (4, done.err)
    asked = command.run(parked.environment, "inbox", "unpark", "--all", "--no-wait")
    assert (asked.exit_code, asked.out) == (0, "asked for 2 to be handled again\n")
    none = command.run(parked.environment, "inbox", "unpark", "--all")
    assert (none.exit_code, none.out) == (0, "nothing is parked; 3 are being tried again\n")
    assert {row["state"] for row in rows(parked)} == {"retry"}


def test_one_id_of_two_sources(parked: World) -> None:
    with psycopg.connect(parked.dsn) as connection:
        for source in ("eu", "us"):
            park(connection, Inbox("billing"), a_message("m-7", source=source, topic="orders"))
    done = command.run(parked.environment, "inbox", "discard", "m-7")
    assert done.exit_code == 2
    assert "several have message 'm-7': billing eu, billing us" in done.err
    done = command.run(parked.environment, "inbox", "discard", "m-7", "--source", "eu")
    assert (done.exit_code, done.out) == (0, "message 'm-7' discarded\n")
    done = command.run(parked.environment, "inbox", "discard", "--all")
    assert (done.exit_code, len(done.out.splitlines())) == (0, 4)


def test_one_of_a_topic_that_nobody_reads_any_more(parked: World) -> None:
    """It stays to be tried again for ever, and can be given up all the same."""
    command.run(parked.environment, "inbox", "unpark", "m-1", "--no-wait")
    done = command.run(parked.environment, "inbox", "discard", "m-1")
    assert (done.exit_code, done.out) == (0, "message 'm-1' discarded\n")


def test_discard(parked: World) -> None:
    refused = command.run(parked.environment, "inbox", "discard", "m-1a")
    assert refused.exit_code == 4
    assert "waits behind 'm-1'" in refused.err
    done = command.run(parked.environment, "inbox", "discard", "--all", "--consumer", "billing")
    assert (done.exit_code, done.out) == (0, "message 'm-1' discarded\nmessage 'm-2' discarded\n")
    assert [(row["message_id"], row["state"]) for row in rows(parked)] == [("m-1a", "retry"), ("m-2", "parked")]


@pytest.mark.parametrize("verb", ["unpark", "discard"])
def test_which_ones_must_be_said(parked: World, verb: str) -> None:
    for arguments in ([], ["m-1", "--all"]):
        done = command.run(parked.environment, "inbox", verb, *arguments)
        assert done.exit_code == 2
        assert "name messages by their ids, or say --all" in done.err


def test_a_database_without_an_inbox(world: World) -> None:
    done = command.run(world.environment, "inbox", "list")
    assert done.exit_code == 3
    assert 'relation "public.inbox_parked" does not exist -- `cdc-outbox migrate inbox up` makes it' in done.err
    wrong = command.run(world.environment, "inbox", "list", "--table", "a.b.c")
    assert wrong.exit_code == 2
    assert "--table: 'a.b.c' is not a table name" in wrong.err
