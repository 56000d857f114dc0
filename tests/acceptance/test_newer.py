"""``newer`` through every driver: a projection is never set back."""

import threading
from typing import Any

import pytest

from support.applications import ALL, Application, Consumer, Start, a_message
from support.world import World

every_driver = pytest.mark.parametrize("kind", ALL)
pytestmark = pytest.mark.parametrize("consuming", ["plain"], indirect=True)


@every_driver
def test_only_what_is_newer(consuming: World, start: Start, kind: type[Application]) -> None:
    application = start(kind)
    inbox = Consumer(application, "search")

    def newer(version: int | str | None, **more: Any) -> bool:
        message = a_message(**{"key": "a \u00e9 %s :x ?", "topic": "orders", **more})
        return bool(inbox.call("newer", message, version=version))

    with application.inside(application.transaction()):
        assert [newer(version) for version in (1, 1, 3, 2, 3, 10, 9)] == [True, False, True, False, False, True, False]
        assert newer(1, key="b")
        assert newer(1, topic="payments")
        assert newer(1, source="eu")
        assert Consumer(application, "mail").call("newer", a_message(key="a", topic="orders"), version=1)
        texts = ("2026-01-01T00:00", "2026-01-01T00:00", "2026-01-02T00:00", "2025-12-31T00:00")
        assert [newer(text, key="t") for text in texts] == [True, False, True, False]
        sequences = [f"{number:040x}" for number in (15, 255, 16)]
        assert [newer(None, key="s", sequence=sequence) for sequence in sequences] == [True, True, False]
    with pytest.raises(ZeroDivisionError), application.inside(application.transaction()):
        assert newer(20)
        1 / 0  # noqa: B018
    with application.inside(application.transaction()):
        assert newer(20, value=None)  # a tombstone
        assert not newer(19)  # and what comes late after it


@pytest.mark.parametrize(
    ("message", "version", "told"),
    [
        ({"key": None}, 1, "has no key"),
        ({"key": "a"}, None, "give version="),
        ({"key": "a"}, True, "give version="),
        ({"key": "a"}, 1.5, "give version="),
        ({"key": "a"}, -1, "is negative"),
        ({"key": "a"}, 10**20, "more than 20 digits"),
        ({"key": "a"}, "10", "'10' is a number in a text"),
        ({"key": "a"}, "", "the version is empty"),
        ({"key": "a"}, "1\0", "has a NUL"),
        ({"key": "a", "sequence": "0\0f"}, None, "the header sequence is empty, has a NUL"),
        ({"key": "a", "sequence": "0" * 501}, None, "over 500 bytes"),
        ({"key": "k" * 501}, 1, "the key is empty, has a NUL in it, is no text, or has over 500 bytes"),
    ],
)
def test_what_has_no_order_is_refused(
    consuming: World, start: Start, message: dict[str, Any], version: Any, told: str
) -> None:
    application = start()
    with pytest.raises(ValueError, match=told), application.inside(application.transaction()):
        Consumer(application, "search").call("newer", a_message(**message), version=version)


def test_another_kind_of_version_begins_again(consuming: World, start: Start) -> None:
    """They cannot be compared; and nothing must be old for ever."""
    application = start()
    inbox = Consumer(application, "search")
    with application.inside(application.transaction()):
        for version, sequence in ((None, "68e5" + "0" * 36), (7, None), ("2026-01-01", None), (1, None)):
            assert inbox.call("newer", a_message(key="a", sequence=sequence), version=version)
            assert not inbox.call("newer", a_message(key="a", sequence=sequence), version=version)


def test_two_sessions_at_once(consuming: World, start: Start) -> None:
    """The one that comes second waits, and is newer only if its version is."""
    first, second = start(), start()
    answers: list[bool] = []

    def ask(version: int) -> None:
        with second.inside(second.transaction()):
            answers.append(Consumer(second, "search").call("newer", a_message(key="a"), version=version))

    for version, mine in ((1, 2), (4, 3)):
        with first.inside(first.transaction()):
            assert Consumer(first, "search").call("newer", a_message(key="a"), version=mine)
            thread = threading.Thread(target=ask, args=[version])
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
        thread.join()
    assert answers == [False, True]
