"""Poison is parked in order, through every driver: what follows of its key waits behind it, and nothing else does."""

import threading
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from cdc_outbox.inbox import Message, NotParked, OpenTransaction
from cdc_outbox.inbox import schema as inbox_sql
from cdc_outbox.inbox.attempts import DIED
from cdc_outbox.inbox.parking import _portions
from cdc_outbox.inbox.psycopg import Inbox
from support.applications import ALL, Application, Consumer, Psycopg, Start, a_message
from support.waiting import wait_until
from support.world import World, make_world

every_driver = pytest.mark.parametrize("kind", ALL)
on_plain = pytest.mark.parametrize("consuming", ["plain"], indirect=True)


def states(world: World) -> dict[str, str]:
    rows = world.db.execute("SELECT message_id, state FROM inbox_parked ORDER BY place").fetchall()
    return dict(rows)


def be_due(world: World) -> None:
    """As if the time of waiting, or of a lease, were over."""
    world.db.execute("UPDATE inbox_parked SET due_at = now()")


def consume(application: Application, inbox: Consumer, *messages: Message) -> list[str]:
    """What is left to be handled of new messages."""
    with application.inside(application.transaction()):
        fresh = inbox.once_many(messages)
        return [message.id for message in inbox.call("park_followers", fresh)]


def park(application: Application, inbox: Consumer, message: Message, error: object = "broken", **more: Any) -> None:
    with application.inside(application.transaction()):
        inbox.call("park", message, error, **more)


def retry(application: Application, inbox: Consumer, *, attempts: int = 5) -> str | None:
    """Handles the next one that is due; returns its id."""
    message = inbox.call("due", attempts=attempts)
    if message is None:
        return None
    with application.inside(application.transaction()):
        assert inbox.call("retry", message)
    return str(message.id)


@every_driver
def test_a_key_waits_and_no_other_does(consuming: World, start: Start, kind: type[Application]) -> None:
    application = start(kind)
    inbox = Consumer(application, "billing")
    poison = a_message("1", key="a", topic="orders")
    park(application, inbox, poison, ValueError("no such \N{EURO SIGN}"))
    assert consume(application, inbox, poison) == []
    others = [
        a_message("2", key="b", topic="orders"),
        a_message("3", key="a", topic="payments"),
        a_message("4", key=None, topic="orders"),
    ]
    followers = [a_message("5", key="a", topic="orders"), a_message("6", key="a", topic="orders")]
    assert consume(application, inbox, others[0], *followers, *others[1:]) == ["2", "3", "4"]
    assert consume(application, inbox, *followers) == []
    assert states(consuming) == {"1": "parked", "5": "behind", "6": "behind"}
    assert consume(application, Consumer(application, "shipping"), *followers) == ["5", "6"]  # its own affair
    assert retry(application, inbox) is None
    with application.inside(application.transaction()):
        inbox.call("unpark", "1")
    assert [retry(application, inbox) for _ in range(4)] == ["1", "5", "6", None]
    assert set(states(consuming).values()) == {"handled"}
    assert consume(application, inbox, a_message("7", key="a", topic="orders")) == ["7"]
    error = consuming.db.execute("SELECT error FROM inbox_parked WHERE message_id = '1'").fetchone()
    assert error == ("ValueError: no such \N{EURO SIGN}",)


@every_driver
def test_a_message_comes_back_as_it_was(consuming: World, start: Start, kind: type[Application]) -> None:
    application = start(kind)
    inbox = Consumer(application, "billing")
    more: dict[str, Any] = {"partition": 3, "offset": 12, "type": "opened", "source": "eu", "sequence": "0f"}
    headers = {"tenant": "\u00e9 %s :x ? $1 \0", "gone": None, "odd": "\udc80"}
    values: list[Any] = [
        b"\0\xff\xfe",
        b"",
        None,
        "text \0 \u20ac \udc80",
        "",
        {"a": [1, None, "\0\u20ac"]},
        0,
        False,
        [],
        "1",
    ]
    for number, value in enumerate(values):
        message = a_message(f"m-{number}", key="k \0 \u20ac", topic="t", value=value, headers=headers, **more)
        park(application, inbox, message)
        with application.inside(application.transaction()):
            inbox.call("unpark", message.id, source="eu")
        back = inbox.call("due")
        assert back == message
        assert type(back.value) is type(value)
        with application.inside(application.transaction()):
            assert inbox.call("retry", back)
            assert not inbox.call("retry", back)
    with pytest.raises(TypeError, match="a set cannot be kept"), application.inside(application.transaction()):
        inbox.call("park", a_message("m-set", value={1}), "broken")


@every_driver
def test_it_is_tried_again_as_often_as_asked(consuming: World, start: Start, kind: type[Application]) -> None:
    application = start(kind)
    inbox = Consumer(application, "billing")
    message = a_message("1", key="a")
    park(application, inbox, message, "first", attempts=3)
    assert states(consuming) == {"1": "retry"}
    assert retry(application, inbox) is None  # not yet
    for error, state in (("second", "retry"), ("third", "parked")):
        be_due(consuming)
        again = inbox.call("due", attempts=3)
        assert again.id == "1"
        assert inbox.call("due", attempts=3) is None  # somebody has it
        with pytest.raises(ZeroDivisionError), application.inside(application.transaction()):
            assert inbox.call("retry", again)
            1 / 0  # noqa: B018
        park(application, inbox, again, error, attempts=3)
        assert states(consuming) == {"1": state}
    assert consuming.db.execute("SELECT attempts, error FROM inbox_parked").fetchone() == (3, "third")
    with application.inside(application.transaction()):
        inbox.call("unpark", "1")
    assert retry(application, inbox, attempts=3) == "1"


@every_driver
def test_a_handler_that_ends_its_process_is_found(consuming: World, start: Start, kind: type[Application]) -> None:
    """By what is written down before each attempt."""
    application = start(kind)
    inbox = Consumer(application, "billing")
    park(application, inbox, a_message("1", key="a"))
    with application.inside(application.transaction()):
        inbox.call("unpark", "1")
    consuming.db.execute("UPDATE inbox_parked SET error = NULL")
    for _ in range(3):
        assert inbox.call("due", attempts=3).id == "1"
        be_due(consuming)
    assert inbox.call("due", attempts=3) is None
    row = consuming.db.execute("SELECT state, attempts, error FROM inbox_parked").fetchone()
    assert row == ("parked", 3, DIED)


@every_driver
def test_what_cannot_be_decided_says_why(consuming: World, start: Start, kind: type[Application]) -> None:
    application = start(kind)
    inbox = Consumer(application, "billing")
    park(application, inbox, a_message("1", key="a"))
    consume(application, inbox, a_message("2", key="a"))

    def refused(verb: str, message_id: str) -> str:
        with pytest.raises(NotParked) as refusal, application.inside(application.transaction()):
            inbox.call(verb, message_id)
        return str(refusal.value)

    assert refused("unpark", "0") == (
        "message '0' of consumer 'billing' is not parked; `cdc-outbox inbox list` shows what is"
    )
    assert refused("discard", "2") == ("message '2' waits behind '1', which has the same key: decide about that one")
    with application.inside(application.transaction()):
        inbox.call("unpark", "1")
    assert refused("unpark", "1") == "message '1' is about to be tried again already"
    assert retry(application, inbox) == "1"
    assert refused("unpark", "1") == "message '1' was handled already"
    with pytest.raises(OpenTransaction), application.inside(application.transaction()):
        application.execute("SELECT 1")
        inbox.call("due")


@on_plain
def test_what_is_discarded_lets_the_others_go_on(consuming: World, start: Start) -> None:
    application = start()
    inbox = Consumer(application, "billing")
    park(application, inbox, a_message("1", key="a"))
    assert consume(application, inbox, a_message("2", key="a"), a_message("3", key="a")) == []
    with application.inside(application.transaction()):
        inbox.call("discard", "1")
    assert [retry(application, inbox) for _ in range(3)] == ["2", "3", None]
    assert states(consuming) == {"1": "discarded", "2": "handled", "3": "handled"}


@on_plain
def test_a_follower_that_fails_stops_its_key_again(consuming: World, start: Start) -> None:
    application = start()
    inbox = Consumer(application, "billing")
    park(application, inbox, a_message("1", key="a"))
    consume(application, inbox, a_message("2", key="a"), a_message("3", key="a"))
    with application.inside(application.transaction()):
        inbox.call("unpark", "1")
    assert retry(application, inbox) == "1"
    second = inbox.call("due", attempts=1)
    park(application, inbox, second)
    assert states(consuming) == {"1": "handled", "2": "parked", "3": "behind"}
    assert retry(application, inbox) is None


@on_plain
def test_who_follows_one_that_is_parked_is_not_woken_by_another(consuming: World, start: Start) -> None:
    """Two of a key that are parked themselves, as one without an id is; the third waits for the second."""
    application = start()
    inbox = Consumer(application, "billing")
    park(application, inbox, a_message("1", key="a"))
    park(application, inbox, a_message("2", key="a"))
    consume(application, inbox, a_message("3", key="a"))
    with application.inside(application.transaction()):
        inbox.call("unpark", "1")
    assert [retry(application, inbox), retry(application, inbox)] == ["1", None]
    assert states(consuming) == {"1": "handled", "2": "parked", "3": "behind"}


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
def test_what_another_session_has_handled_is_not_parked(consuming: World, start: Start) -> None:
    """A process that was frozen in its handler, and whose partition another one got meanwhile."""
    application, other = start(), start()
    message = a_message("1", key="a")
    with other.inside(other.transaction()):
        assert Consumer(other, "billing").once(message)
    park(application, Consumer(application, "billing"), message)
    assert states(consuming) == {}


@on_plain
def test_a_follower_that_comes_while_the_last_one_is_tried(consuming: World, start: Start) -> None:
    """It is parked behind it, in a transaction that ends later; and it is not forgotten there."""
    application, other = start(), start()
    inbox, others = Consumer(application, "billing"), Consumer(other, "billing")
    park(application, inbox, a_message("1", key="a"))
    with application.inside(application.transaction()):
        inbox.call("unpark", "1")
    first = inbox.call("due")
    with other.inside(other.transaction()):
        follower = a_message("2", key="a")
        assert others.once(follower)
        with application.inside(application.transaction()):
            assert inbox.call("retry", first)
            assert others.call("park_followers", [follower]) == []  # it does not wait for that transaction
        assert inbox.call("due") is None
    assert states(consuming) == {"1": "handled", "2": "behind"}
    assert retry(application, inbox) == "2"


@on_plain
def test_a_handler_that_is_slower_than_its_lease(consuming: World, start: Start) -> None:
    """Another process takes the message, waits for the first one, and finds that it is done."""
    application, other = start(), start()
    inbox, others = Consumer(application, "billing"), Consumer(other, "billing")
    park(application, inbox, a_message("1", key="a"))
    with application.inside(application.transaction()):
        inbox.call("unpark", "1")
    message = inbox.call("due")
    be_due(consuming)
    again = others.call("due")
    assert again == message
    answers: list[bool] = []

    def take() -> None:
        with other.inside(other.transaction()):
            answers.append(others.call("retry", again))

    with application.inside(application.transaction()):
        assert inbox.call("retry", message)
        thread = threading.Thread(target=take)
        thread.start()
        waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        wait_until(lambda: consuming.db.execute(waiting).rowcount == 1, "the other one waits")
    thread.join()
    assert answers == [False]


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


def test_attempts_are_written_down_beforehand(consuming: World) -> None:
    inbox, message = Inbox("billing"), a_message("1")
    with psycopg.connect(consuming.dsn) as connection:
        assert [inbox.count_attempt(connection, message) for _ in range(3)] == [1, 2, 3]
        assert inbox.once(connection, message)
        inbox.forget_attempts(connection, [message])
        connection.commit()
        assert inbox.count_attempt(connection, message) == 1


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
