"""What ``mypy --strict`` says of user code: nothing where it is right; where it is wrong, that it is."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

CACHE: Final = Path(__file__).parents[2] / ".mypy_cache" / "user_code"

RIGHT = """
import asyncpg
import psycopg
import psycopg2
from confluent_kafka import Consumer
from pydantic import BaseModel
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from cdc_outbox.inbox import asyncpg as inbox_asyncpg
from cdc_outbox.inbox import psycopg as inbox_psycopg
from cdc_outbox.inbox.django import Inbox as DjangoInbox
from cdc_outbox.inbox.psycopg import Message
from cdc_outbox.outbox import Event, asyncpg as outbox_asyncpg, dbapi as outbox_dbapi
from cdc_outbox.outbox import django as outbox_django, psycopg as outbox_psycopg, sqlalchemy as outbox_sqlalchemy
from cdc_outbox.testing import assert_emitted, assert_emitted_async, assert_idempotent


class Placed(BaseModel):
    total: int


event = Event("order.placed", "42", Placed(total=1))
events = [Event("a", "1", None), Event("a", "1", b""), Event("a", "1", "{}"), Event("a", "1", [1, {"b": 2.5}])]
made: dict[str, int] = {"total": 1}
events.append(Event("order.placed", "42", made, aggregate_type="order", headers={"tenant": "t"}))


def with_psycopg(connection: psycopg.Connection, rows: psycopg.Connection[dict[str, object]]) -> None:
    outbox_psycopg.Outbox().emit(connection, event)
    outbox_psycopg.Outbox("app.outbox", columns={"headers": None}).emit_many(rows, events)
    assert_emitted(connection, "order.placed")


def with_sqlalchemy(connection: Connection, session: Session) -> None:
    outbox_sqlalchemy.Outbox().emit(connection, event)
    outbox_sqlalchemy.Outbox().emit(session, event)
    assert_emitted(session, "order.placed")


async def with_async_sqlalchemy(connection: AsyncConnection, session: AsyncSession) -> None:
    await outbox_sqlalchemy.AsyncOutbox().emit(connection, event)
    await outbox_sqlalchemy.AsyncOutbox().emit(session, event)
    await assert_emitted_async(session, "order.placed")


async def with_asyncpg(connection: asyncpg.Connection, pool: asyncpg.Pool) -> None:
    await outbox_asyncpg.AsyncOutbox().emit(connection, event)
    async with pool.acquire() as one, one.transaction():
        await outbox_asyncpg.AsyncOutbox().emit(one, event)
        await assert_emitted_async(one, "order.placed")


def with_django() -> None:
    from django.db import connection

    outbox_django.Outbox().emit(event)
    outbox_django.Outbox().emit_many(events, using="other")
    assert_emitted(connection, "order.placed")


def with_psycopg2() -> None:
    with psycopg2.connect("") as connection:
        outbox_dbapi.Outbox().emit(connection, event)
        assert_emitted(connection, "order.placed")


def consume(consumer: Consumer, connection: psycopg.Connection) -> list[Message]:
    record = consumer.poll(1.0)
    if record is None or record.error():
        return []
    message = Message.from_confluent(record)
    if DjangoInbox("billing").once(message, using="default"):
        return [message]
    assert_idempotent(lambda message: print(message.id), message, state=lambda: 1)
    return inbox_psycopg.Inbox("billing").once_many(connection, [message])


async def consume_async(connection: asyncpg.Connection, message: Message) -> bool:
    return await inbox_asyncpg.AsyncInbox("billing").once(connection, message)
"""

#: Each line that is wrong names the code of mypy's error.
WRONG = """
import asyncpg
import psycopg
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from cdc_outbox.inbox.asyncpg import AsyncInbox
from cdc_outbox.inbox.psycopg import Inbox, Message
from cdc_outbox.outbox.asyncpg import AsyncOutbox
from cdc_outbox.outbox.psycopg import AsyncOutbox as AsyncPsycopgOutbox, Event, Outbox
from cdc_outbox.outbox.sqlalchemy import Outbox as SqlalchemyOutbox

event = Event("order.placed", "42", {})
Event(event_tpye="order.placed", aggregate_id="42", payload={})  # call-arg
Event("order.placed", "42")  # call-arg
Event("order.placed", 42, {})  # arg-type
Event("order.placed", "42", {}, headers={"attempt": 1})  # dict-item
Event("order.placed", "42", object())  # arg-type
event.event_type = "order.gone"  # misc
Outbox(tabel="app.outbox")  # call-arg
Inbox()  # call-arg


def sync(connection: psycopg.Connection, session: Session, message: Message) -> None:
    Outbox().emit(session, event)  # arg-type
    SqlalchemyOutbox().emit(connection, event)  # arg-type
    AsyncPsycopgOutbox().emit(connection, event)  # arg-type
    Outbox().emit(event)  # call-arg
    Outbox().emit(connection, {"event_type": "order.placed"})  # arg-type
    Inbox("billing").once(session, message)  # arg-type
    Inbox("billing").once(connection, event)  # arg-type
    Inbox("billing").onec(connection, message)  # attr-defined
    message.message_id  # attr-defined


async def asynchronous(connection: asyncpg.Connection, pool: asyncpg.Pool, session: AsyncSession, m: Message) -> None:
    AsyncOutbox().emit(connection, event)  # unused-coroutine
    AsyncInbox("billing").once(connection, m)  # unused-coroutine
    await AsyncOutbox().emit(pool, event)  # arg-type
    await AsyncOutbox().emit(session, event)  # arg-type
    SqlalchemyOutbox().emit(session, event)  # arg-type
    if AsyncInbox("billing").once(connection, m):  # truthy-bool
        pass
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> str:
    """All that mypy says of both."""
    folder = tmp_path_factory.mktemp("typing")
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text(WRONG)
    (folder / "mypy.ini").write_text("[mypy]\nstrict = True\n")
    options = ["--enable-error-code", "truthy-bool", "--disable-error-code", "type-arg"]  # asyncpg's classes take some
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--cache-dir", CACHE, "right.py", "wrong.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout


def test_right_code_is_right(told: str) -> None:
    assert [line for line in told.splitlines() if line.startswith("right.py")] == []


@pytest.mark.rest
def test_wrong_code_is_an_error_on_each_line(told: str) -> None:
    expected = {
        number: code
        for number, line in enumerate(WRONG.splitlines(), 1)
        for code in re.findall(r"# ([a-z-]+)$", line)
        if not line.startswith("#")
    }
    found: dict[int, set[str]] = {}
    for number, code in re.findall(r"^wrong\.py:(\d+): error: .*\[([a-z-]+)\]$", told, re.MULTILINE):
        found.setdefault(int(number), set()).add(code)
    assert found.keys() == expected.keys(), told
    assert all(code in found[number] for number, code in expected.items()), told
