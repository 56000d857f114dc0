"""Poison is parked in order, through every driver: what follows of its key waits behind it, and nothing else does."""

import threading
from typing import Any

import psycopg
import pytest

from cdc_outbox.inbox import NotParked, OpenTransaction
from cdc_outbox.inbox.attempts import DIED
from cdc_outbox.inbox.psycopg import Inbox
from support.applications import ALL, Application, Consumer, Start, a_message
from support.parking import consume, on_plain, park, retry, states
from support.waiting import wait_until
from support.world import World

every_driver = pytest.mark.parametrize("kind", ALL)


def be_due(world: World) -> None:
    """As if the time of waiting, or of a lease, were over."""
    world.db.execute("UPDATE inbox_parked SET due_at = now()")


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


def test_attempts_are_written_down_beforehand(consuming: World) -> None:
    inbox, message = Inbox("billing"), a_message("1")
    with psycopg.connect(consuming.dsn) as connection:
        assert [inbox.count_attempt(connection, message) for _ in range(3)] == [1, 2, 3]
        assert inbox.once(connection, message)
        inbox.forget_attempts(connection, [message])
        connection.commit()
        assert inbox.count_attempt(connection, message) == 1
