"""Many parked messages: keys, followers, large ones, other encodings."""

import time
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from cdc_outbox.inbox import Message
from cdc_outbox.inbox import schema as inbox_sql
from cdc_outbox.inbox.parking import _portions
from support.applications import Consumer, Psycopg, Start, a_message
from support.parking import consume, on_plain, park, retry, states
from support.waiting import wait_until
from support.world import World, make_world


@on_plain
def test_a_hundred_thousand_keys_with_one_each(consuming: World, start: Start) -> None:
    """Whether one is due is found without reading them."""
    consuming.db.execute(
        """INSERT INTO inbox_parked (consumer, message_id, lane, details, state, attempts)
           SELECT 'billing', n, gen_random_uuid(), '{}', 'parked', 5 FROM generate_series(1, 100000) AS n"""
    )
    application = start()
    inbox = Consumer(application, "billing")
    inbox.call("due")
    began = time.monotonic()
    for _ in range(10):
        assert inbox.call("due") is None
    assert time.monotonic() - began < 0.5


@on_plain
def test_ten_thousand_followers_do_not_slow_the_others_down(consuming: World, start: Start) -> None:
    """Whose turn it is is found from key to key: those that wait behind one are not read."""
    application = start()
    inbox = Consumer(application, "billing")
    park(application, inbox, a_message("0", key="hot"))
    consume(application, inbox, *(a_message(f"h-{number}", key="hot") for number in range(10_000)))
    park(application, inbox, a_message("1", key="a"))
    with application.inside(application.transaction()):
        inbox.call("unpark", "1")

    def rows_read() -> int:
        consuming.db.execute("SELECT pg_stat_clear_snapshot()")
        row = consuming.db.execute(
            "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'inbox_parked'"
        ).fetchone()
        return int(row[0]) if row else 0

    application.close()  # statistics are sent at the latest then
    with psycopg.connect(consuming.dsn, autocommit=True) as other:
        other.execute("VACUUM ANALYZE inbox_parked")
    wait_until(lambda: rows_read() > 0, "what was read by now is known")
    consuming.db.execute("SELECT pg_stat_reset()")
    application = start()
    inbox = Consumer(application, "billing")
    assert retry(application, inbox) == "1"
    assert retry(application, inbox) is None

    application.close()
    wait_until(lambda: rows_read() > 0, "what was read is known")
    assert rows_read() < 100


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_nothing_of_a_row_keeps_it_from_being_parked(postgres: str, kafka: str, encoding: str) -> None:
    with make_world(postgres, kafka, encoding=encoding) as world, ExitStack() as stack:
        world.db.execute(inbox_sql.sql().encode())
        message = a_message("1", key="\u20ac \0", value=b"\xff\0", headers={"h": "\u20ac \0"})
        application = stack.enter_context(closing(Psycopg(world.dsn)))
        inbox = Consumer(application, "billing")
        park(application, inbox, message, ValueError("\u20ac \0 \udc80"))
        with application.inside(application.transaction()):
            inbox.call("unpark", "1")
        assert inbox.call("due") == message
        error = world.db.execute("SELECT error FROM inbox_parked").fetchone()
        assert error == (r"ValueError: \u20ac \ufffd \udc80",)


@on_plain
def test_what_is_past_is_pruned_and_what_waits_is_not(consuming: World, start: Start) -> None:
    application = start()
    inbox = Consumer(application, "billing")
    for name in ("1", "2", "3"):
        park(application, inbox, a_message(name, key=name))
    with application.inside(application.transaction()):
        inbox.call("discard", "1")
        inbox.call("unpark", "2")
    consuming.db.execute("TRUNCATE inbox")
    assert inbox.prune(timedelta()) == 1
    assert states(consuming) == {"2": "retry", "3": "parked"}
    # the ids are forgotten, too: a message that comes again is behind itself, and not handled beside it
    assert consume(application, inbox, a_message("3", key="3")) == []
    assert consume(application, inbox, a_message("1", key="1")) == ["1"]
    park(application, inbox, replace(a_message("4", key="1"), value=b"new"))
    assert states(consuming) == {"2": "retry", "3": "parked", "4": "parked"}


def test_ids_are_not_pruned_while_their_message_waits(consuming: World, start: Start) -> None:
    """Nor soon after it was handled: counted from when it was parked they are old."""
    application = start()
    inbox = Consumer(application, "billing")
    messages = [a_message("1", key=None), a_message("2", key="a"), a_message("3", key="b")]
    for message in messages:
        park(application, inbox, message)
    consuming.db.execute("UPDATE inbox SET processed_at = now() - interval '8 days'")
    consuming.db.execute("UPDATE inbox_parked SET parked_at = now() - interval '8 days'")
    with application.inside(application.transaction()):
        inbox.call("unpark", "2")
        inbox.call("discard", "3")
    assert retry(application, inbox) == "2"
    assert inbox.prune(timedelta(days=7)) == 0
    assert consume(application, inbox, *messages) == []
    consuming.db.execute("UPDATE inbox_parked SET changed_at = now() - interval '8 days'")
    assert inbox.prune(timedelta(days=7)) == 4  # two ids, two parked messages
    assert states(consuming) == {"1": "parked"}


def test_keys_that_are_no_text_stay_apart(consuming: World, start: Start) -> None:
    application = start()
    inbox = Consumer(application, "billing")

    def message(name: str, key: bytes) -> Message:
        return Message.from_headers({"id": name}, key=key, value=b"", committed_at=datetime.now(UTC), topic="t")

    park(application, inbox, message("1", b"\x01\xc8"))
    assert consume(application, inbox, message("2", b"\x01\xc9"), message("3", b"\x01\xc8")) == ["2"]


@on_plain
def test_many_large_followers_are_parked_in_portions(consuming: World, start: Start) -> None:
    """One statement with all of them would take the server a gigabyte or more."""
    application = start()
    inbox = Consumer(application, "billing")
    park(application, inbox, a_message("0", key="a"))
    followers = [a_message(f"f-{number}", key="a", value=bytes(1_000_000)) for number in range(20)]
    assert consume(application, inbox, *followers) == []
    rows = consuming.db.execute(
        "SELECT message_id, octet_length(value) FROM inbox_parked WHERE state = 'behind' ORDER BY place"
    )
    assert rows.fetchall() == [(f"f-{number}", 1_000_000) for number in range(20)]
    assert [len(some) for some in _portions([{"value": "x" * 1_500_000}] * 5)] == [2, 2, 1]
    assert [len(some) for some in _portions([{"value": "x" * 9_000_000}] * 2)] == [1, 1]
