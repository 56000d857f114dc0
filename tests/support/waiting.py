"""Waiting for conditions, with deadlines: nothing in this suite sleeps for luck."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str, *, timeout_seconds: float = 15) -> T:
    """The first true value of ``condition``; AssertionError naming ``what`` when time is up."""
    deadline = time.monotonic() + timeout_seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_seconds} s: {what}"
        time.sleep(0.02)
    return value
