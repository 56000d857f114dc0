"""Who may do what: each command, tried with a role that has nothing, says what to grant until it works."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import conninfo

from acceptance.conftest import StartRelay
from cdc_outbox.inbox import schema as inbox_schema
from cdc_outbox.inbox.psycopg import Inbox, Message
from cdc_outbox.outbox.psycopg import Event, Outbox
from support import command
from support.world import World

COMMANDS = (
    "status",
    "status --stuck 0s",
    "dead-letters list",
    "dead-letters show 1",
    "dead-letters redrive 1 --topic nope --key k --no-wait",
    "policy show",
    "policy log",
    "holds list",
    "dead-letters discard 2 --reason tested",
    "prune --older-than 0s",
    "topics list",
    "migrate status",
)
#: More than these nobody should need: the statements are in deploy/operating.md, too.
MOST_GRANTS = 4


@pytest.fixture
def busy(world: World, start_relay: StartRelay) -> World:
    """With two dead letters."""
    world.settings["CDC_OUTBOX_RELAY__ON_POISON"] = "dead-letter"
    world.migrate()
    relay = start_relay()
    for _ in range(2):
        world.insert("no topic")
    world.wait_until_confirmed()
    relay.process.terminate()
    assert relay.process.wait(20) == 0
    return world


@pytest.fixture
def nobody(busy: World) -> Iterator[str]:
    """The name of a role that may log in, and nothing else."""
    name = f"{busy.name}_nobody"
    busy.db.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'secret'")
    yield name
    busy.db.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


@pytest.mark.parametrize("verb", COMMANDS)
def test_what_a_role_lacks_is_said_as_the_statement_that_grants_it(busy: World, nobody: str, verb: str) -> None:
    dsn = conninfo.make_conninfo(busy.dsn, user=nobody, password="secret")
    for _ in range(MOST_GRANTS):
        done = command.run({**busy.environment, "CDC_OUTBOX_POSTGRES__DSN": dsn}, *verb.split())
        if done.exit_code == 0:
            return
        assert done.exit_code == 3, done
        assert "permission denied" in done.error
        _, _, grants = done.error.partition(" -- ")
        assert grants.startswith("GRANT "), done.error
        assert f'TO "{nobody}"' in grants
        busy.db.execute(grants.encode())
    pytest.fail(f"after {MOST_GRANTS} times it still lacks something: {done.error}")


def test_the_relay_s_role_may_not_do_what_operators_do(busy: World) -> None:
    busy.db.execute("ALTER ROLE cdc_outbox_relay PASSWORD 'pw'")
    dsn = conninfo.make_conninfo(busy.dsn, user="cdc_outbox_relay", password="pw")
    for verb in (
        "status --stuck 0s",
        "dead-letters redrive 1 --topic x --key k",
        "prune --older-than 0s",
        "topics list",
    ):
        done = command.run({**busy.environment, "CDC_OUTBOX_POSTGRES__DSN": dsn}, *verb.split())
        assert done.exit_code == 3, verb
        assert "let a role of your own do this: GRANT " in done.error
        assert "cdc_outbox_relay" not in done.error, "the next `migrate up` would take it back"
    status = command.run({**busy.environment, "CDC_OUTBOX_POSTGRES__DSN": dsn}, "status")
    assert status.exit_code == 0, status


def test_applications_and_consumers_need_what_the_readme_says(busy: World, nobody: str) -> None:
    busy.db.execute(inbox_schema.sql().encode())
    with psycopg.connect(conninfo.make_conninfo(busy.dsn, user=nobody, password="secret")) as connection:
        busy.db.execute(f"GRANT INSERT ON outbox TO {nobody}".encode())
        Outbox().emit(connection, Event("opened", "a-1", {}))
        busy.db.execute(f"GRANT SELECT, INSERT ON inbox TO {nobody}".encode())
        assert Inbox("billing").once(connection, Message("m-1", datetime.now(UTC)))
        connection.commit()
        others = "inbox_parked, inbox_attempt, inbox_version, inbox_request"
        busy.db.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {others} TO {nobody}".encode())
        use_all_of_it(connection, Inbox("billing"))
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            Inbox("billing").prune(connection, timedelta())
        busy.db.execute(f"GRANT UPDATE, DELETE ON inbox TO {nobody}".encode())
        assert (
            Inbox("billing").prune(connection, timedelta()) == 3
        )  # ids; what is beside them went before it was refused


def use_all_of_it(connection: psycopg.Connection[Any], inbox: Inbox) -> None:
    """What a consumer does to the tables beside its inbox."""
    first, second = (Message(name, datetime.now(UTC), key="a") for name in ("p-1", "p-2"))
    inbox.count_attempt(connection, first)
    inbox.park(connection, first, "broken", attempts=1)
    inbox.forget_attempts(connection, [first])
    assert inbox.park_followers(connection, inbox.once_many(connection, [second])) == []
    inbox.unpark(connection, "p-1")
    connection.commit()
    for message in (first, second):
        assert inbox.due(connection) == message
        assert inbox.retry(connection, message)
        connection.commit()
    assert inbox.newer(connection, first, version=1)
    assert inbox.request(connection, "a-key", b"").store("done") == "done"
    connection.commit()
