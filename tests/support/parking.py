"""A consumer that parks."""

from typing import Any

import pytest

from cdc_outbox.inbox import Message
from support.applications import Application, Consumer
from support.world import World

on_plain = pytest.mark.parametrize("consuming", ["plain"], indirect=True)


def states(world: World) -> dict[str, str]:
    rows = world.db.execute("SELECT message_id, state FROM inbox_parked ORDER BY place").fetchall()
    return dict(rows)


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
