"""The libraries for applications, as somebody installs them who wants nothing else: small, and typed."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Final

import pytest

from cdc_outbox.inbox import schema as inbox_sql
from support.applications import url
from support.world import World

ROOT: Final = Path(__file__).parents[2]
OURS: Final = {"cdc_outbox", "cdc_outbox.outbox", "cdc_outbox.inbox", "cdc_outbox.transactions"}
#: By module: what an application has imported anyway.
DRIVERS: Final = {
    "psycopg": "psycopg",
    "sqlalchemy": "sqlalchemy, sqlalchemy.orm, sqlalchemy.ext.asyncio",
    "asyncpg": "asyncpg",
    "django": "django.db",
    "dbapi": "psycopg2",
}


def loaded(statement: str) -> set[str]:
    code = f"{statement}\nimport sys, json\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("package", ["outbox", "inbox"])
def test_importing_one_loads_its_driver_and_the_standard_library(package: str, driver: str) -> None:
    before = loaded(f"import {DRIVERS[driver]}")
    more = loaded(f"import {DRIVERS[driver]}, cdc_outbox.{package}.{driver}") - before
    ours = {name for name in more if name.partition(".")[0] == "cdc_outbox"}
    assert {name for name in ours if not name.startswith(tuple(OURS - {"cdc_outbox"}))} <= {"cdc_outbox"}
    foreign = {name.partition(".")[0] for name in more - ours} - set(sys.stdlib_module_names)
    assert foreign <= {name.partition(".")[0] for name in before}, foreign


def test_the_core_loads_the_standard_library_only() -> None:
    more = loaded("import cdc_outbox.outbox, cdc_outbox.inbox, cdc_outbox.inbox.schema") - loaded("")
    assert {name.partition(".")[0] for name in more} - set(sys.stdlib_module_names) == {"cdc_outbox"}


def test_the_pytest_plugin_loads_pytest_and_little_else() -> None:
    more = loaded("import pytest, cdc_outbox.testing.plugin") - loaded("import pytest")
    assert {name.partition(".")[0] for name in more} - set(sys.stdlib_module_names) == {"cdc_outbox"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


MESSAGE = """
from datetime import UTC, datetime, timedelta
from uuid import uuid4
message = Message(str(uuid4()), datetime.now(UTC))
event = Event("order.placed", "42", {"total": 1})
"""

BARE = {
    "psycopg": (
        ["psycopg[binary]"],
        """
import psycopg
from cdc_outbox.inbox.psycopg import Inbox, Message
from cdc_outbox.outbox.psycopg import Event, Outbox
MESSAGE
with psycopg.connect(DSN) as connection:
    Outbox().emit(connection, event)
    assert Inbox("billing").once(connection, message)
    assert not Inbox("billing").once(connection, message)
    connection.commit()
    assert Inbox("billing").prune(connection, timedelta()) == 1
""",
    ),
    "sqlalchemy": (
        ["sqlalchemy", "psycopg[binary]"],
        """
import sqlalchemy
from sqlalchemy.orm import Session
from cdc_outbox.inbox.sqlalchemy import Inbox, Message
from cdc_outbox.outbox.sqlalchemy import Event, Outbox
MESSAGE
with Session(sqlalchemy.create_engine("postgresql+psycopg" + URL)) as session:
    Outbox().emit(session, event)
    assert Inbox("billing").once(session, message)
    assert not Inbox("billing").once(session, message)
    session.commit()
    assert Inbox("billing").prune(session, timedelta()) == 1
""",
    ),
    "asyncpg": (
        ["asyncpg"],
        """
import asyncio, asyncpg
from cdc_outbox.inbox.asyncpg import AsyncInbox, Message
from cdc_outbox.outbox.asyncpg import AsyncOutbox, Event
MESSAGE
async def main():
    connection = await asyncpg.connect("postgresql" + URL)
    async with connection.transaction():
        await AsyncOutbox().emit(connection, event)
        assert await AsyncInbox("billing").once(connection, message)
        assert not await AsyncInbox("billing").once(connection, message)
    assert await AsyncInbox("billing").prune(connection, timedelta()) == 1
    await connection.close()
asyncio.run(main())
""",
    ),
    "django": (
        ["django", "psycopg[binary]"],
        """
import django
from django.conf import settings
DATABASE = {"ENGINE": "django.db.backends.postgresql", "NAME": PARTS["dbname"], "HOST": PARTS["host"],
            "PORT": PARTS["port"], "USER": PARTS["user"], "PASSWORD": PARTS.get("password", "")}
settings.configure(DATABASES={"default": DATABASE}, INSTALLED_APPS=["cdc_outbox.inbox.django"])
django.setup()
from django.db import transaction
from cdc_outbox.inbox.django import Inbox, Message
from cdc_outbox.outbox.django import Event, Outbox
MESSAGE
with transaction.atomic():
    Outbox().emit(event)
    assert Inbox("billing").once(message)
    assert not Inbox("billing").once(message)
assert Inbox("billing").prune(timedelta()) == 1
""",
    ),
    "dbapi": (
        ["psycopg2-binary"],
        """
import psycopg2
from cdc_outbox.inbox.dbapi import Inbox, Message
from cdc_outbox.outbox.dbapi import Event, Outbox
MESSAGE
connection = psycopg2.connect(DSN)
with connection:
    Outbox().emit(connection, event)
    assert Inbox("billing").once(connection, message)
    assert not Inbox("billing").once(connection, message)
assert Inbox("billing").prune(connection, timedelta()) == 1
""",
    ),
}


@pytest.mark.parametrize("driver", BARE)
@pytest.mark.rest
def test_without_anything_else_it_works(world: World, wheel: Path, tmp_path: Path, driver: str) -> None:
    """Installed with --no-deps beside the driver, in an environment that has nothing else."""
    from psycopg import conninfo

    world.migrate()
    world.db.execute(inbox_sql.sql().encode())
    requirements, code = BARE[driver]
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare")
    python = tmp_path / "bare" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--disable-pip-version-check")
    run(*pip, *(f"{name}=={version(name.partition('[')[0])}" for name in requirements))
    run(*pip, "--no-deps", wheel)
    parts = {name: str(value) for name, value in conninfo.conninfo_to_dict(world.dsn).items()}
    header = f"DSN = {world.dsn!r}\nURL = {url(world.dsn, '')!r}\nPARTS = {parts!r}\n"
    run(python, "-c", header + code.replace("MESSAGE", MESSAGE))
    row = world.db.execute("SELECT event_type, aggregate_id, payload FROM outbox").fetchone()
    assert row == ("order.placed", "42", {"total": 1})
    assert world.db.execute("SELECT FROM inbox").rowcount == 0
