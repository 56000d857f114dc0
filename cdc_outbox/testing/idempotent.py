"""Does a handler act once? Deliver the message to it a second time, and look."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

M = TypeVar("M")


def assert_idempotent(handle: Callable[[M], object], message: M, *, state: Callable[[], object]) -> None:
    """``handle`` acts on the first delivery of ``message`` and not on the second, by what ``state`` returns.

    ``handle`` opens and commits its transaction itself, as it does in production. ``state`` reads what it is meant to
    change: rows, a mailbox, calls of a fake. Raises AssertionError; what ``handle`` raises comes out.
    """
    before = state()
    handle(message)
    once = state()
    _check_first(before, once)
    handle(message)
    _check_second(once, state())


async def assert_idempotent_async(
    handle: Callable[[M], Awaitable[object]], message: M, *, state: Callable[[], Awaitable[object]]
) -> None:
    """As ``assert_idempotent``, for coroutines."""
    before = await state()
    await handle(message)
    once = await state()
    _check_first(before, once)
    await handle(message)
    _check_second(once, await state())


def _check_first(before: object, once: object) -> None:
    if before == once:
        raise AssertionError(
            f"the first delivery changed nothing that state() shows, so this test could not fail: it is {once!r}; "
            "read what the handler changes, through a connection that sees it, and return a value of its own each time"
        )


def _check_second(once: object, twice: object) -> None:
    if once != twice:
        raise AssertionError(
            f"the second delivery of the same message acted again: state() was {once!r}, and is {twice!r}; "
            "ask inbox.once(...) first, in the transaction of the effect"
        )
