"""Requests with an idempotency key, through every driver: carried out once, answered each time."""

import threading
from typing import Any

import pytest

from cdc_outbox.inbox import IdempotencyKeyReused, InProgress, NoTransaction
from support.applications import (
    ALL,
    Application,
    Asyncpg,
    Consumer,
    Django,
    Psycopg,
    Psycopg2,
    SqlalchemySession,
    Start,
)
from support.waiting import wait_until
from support.world import World

every_driver = pytest.mark.parametrize("kind", ALL)
pytestmark = pytest.mark.parametrize("consuming", ["plain"], indirect=True)


def carry_out(application: Application, key: str, body: bytes, response: Any = "done", scope: str = "api") -> Any:
    """As a service does it: the response, and the effect written once."""
    inbox = Consumer(application, scope)
    with application.inside(application.transaction()):
        request = inbox.call("request", key, body)
        if request.replay is not None:
            return request.replay
        application.execute("INSERT INTO effect VALUES ('carried out')")
        return inbox.store(request, response)


def effects(world: World) -> int:
    return world.db.execute("SELECT FROM effect").rowcount


@every_driver
def test_the_first_is_carried_out_and_the_others_get_its_response(
    consuming: World, start: Start, kind: type[Application]
) -> None:
    application = start(kind)
    responses = [b"\0\xff", b"", "text \u20ac", "", {"status": 201, "body": ["\0"]}, [], 0, False]
    for number, response in enumerate(responses):
        key = f"key-{number} \u00e9 %s :x ?"
        for _ in range(3):
            given = carry_out(application, key, b"body", response)
            assert given == response
            assert type(given) is type(response)
    assert effects(consuming) == len(responses)
    with pytest.raises(IdempotencyKeyReused, match="with another body"):
        carry_out(application, "key-0 \u00e9 %s :x ?", b"another body")
    assert carry_out(application, "key-0 \u00e9 %s :x ?", b"another body", scope="another service") == "done"
    assert effects(consuming) == len(responses) + 1


@every_driver
def test_what_fails_is_as_if_it_had_never_come(consuming: World, start: Start, kind: type[Application]) -> None:
    application = start(kind)
    inbox = Consumer(application, "api")
    with pytest.raises(ZeroDivisionError), application.inside(application.transaction()):
        assert inbox.call("request", "a-key", b"body").replay is None
        1 / 0  # noqa: B018
    assert carry_out(application, "a-key", b"a corrected body") == "done"


@every_driver
def test_the_second_waits_for_the_first_or_is_told(consuming: World, start: Start, kind: type[Application]) -> None:
    first, second = start(), start(kind)
    inbox = Consumer(first, "api")
    answers: list[Any] = []

    def ask() -> None:
        answers.append(carry_out(second, "a-key", b"body"))
        second.leave_thread()

    with first.inside(first.transaction()):
        request = inbox.call("request", "a-key", b"body")
        with pytest.raises(InProgress, match="'a-key' is being carried out"), second.inside(second.transaction()):
            second.execute("SET LOCAL lock_timeout = '100ms'")
            Consumer(second, "api").call("request", "a-key", b"body")
        thread = threading.Thread(target=ask)
        thread.start()
        waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        wait_until(lambda: consuming.db.execute(waiting).rowcount == 1, "the second waits")
        inbox.store(request, "of the first")
    thread.join()
    assert answers == ["of the first"]
    assert effects(consuming) == 0


@pytest.mark.parametrize("kind", [Psycopg, Psycopg2])
def test_twenty_at_once(consuming: World, start: Start, kind: type[Application]) -> None:
    """One is carried out."""
    applications = [start(kind) for _ in range(20)]
    begin = threading.Barrier(20)
    answers: list[Any] = []

    def ask(number: int) -> None:
        begin.wait()
        answers.append(carry_out(applications[number], "a-key", b"body", number))

    threads = [threading.Thread(target=ask, args=[number]) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 20
    assert len(set(answers)) == 1
    assert effects(consuming) == 1


@every_driver
def test_without_a_transaction_it_is_refused(consuming: World, start: Start, kind: type[Application]) -> None:
    with pytest.raises(NoTransaction):
        Consumer(start(kind, autocommit=True), "api").call("request", "a-key", b"")
    assert consuming.db.execute("SELECT FROM inbox_request").rowcount == 0


@pytest.mark.parametrize("key", ["", "a\0", "k" * 1001, "\ud800"])
def test_what_is_no_key_is_refused(consuming: World, start: Start, key: str) -> None:
    application = start()
    with pytest.raises(ValueError, match="the idempotency key is empty"), application.inside(application.transaction()):
        Consumer(application, "api").call("request", key, b"")


@pytest.mark.parametrize("kind", [Psycopg, Asyncpg, SqlalchemySession, Django])
def test_what_cannot_be_kept_is_refused(consuming: World, start: Start, kind: type[Application]) -> None:
    application = start(kind)
    inbox = Consumer(application, "api")
    with application.inside(application.transaction()):
        request = inbox.call("request", "a-key", b"")
        with pytest.raises(ValueError, match="None is no response"):
            inbox.store(request, None)
        with pytest.raises(TypeError, match="a set cannot be kept"):
            inbox.store(request, {1})
        for response in ((1, 2), {1: "a number as a key"}, [float("nan")]):
            with pytest.raises(TypeError, match="cannot be kept"):
                inbox.store(request, response)
    with pytest.raises(ZeroDivisionError), application.inside(application.transaction()):
        request = inbox.call("request", "another-key", b"")
        1 / 0  # noqa: B018
    with pytest.raises(RuntimeError, match="is over"), application.inside(application.transaction()):
        inbox.store(request, "too late")
    with pytest.raises(InProgress, match="nothing was stored for it"), application.inside(application.transaction()):
        inbox.call("request", "a-key", b"")
