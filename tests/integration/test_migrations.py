"""sql/ on every PostgreSQL that is here."""

import threading
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from cdc_outbox.errors import ConfigurationError, OperatorNeeded
from cdc_outbox.operations import migrations
from cdc_outbox.operations.migrations import Target
from cdc_outbox.postgres import catalog
from cdc_outbox.postgres.connection import connect
from cdc_outbox.postgres.publication import check_publication, wasteful
from cdc_outbox.postgres.server import check_same_server
from cdc_outbox.postgres.slots import FAILOVER_SINCE, check_slot, find_slot
from cdc_outbox.postgres.stream import ReplicationStream
from support.migrating import as_role, target, up
from support.waiting import wait_until
from support.world import World

FILES = len(migrations.load_migrations())


def states(world: World, wanted: Target | None = None) -> list[str]:
    with connect(world.dsn) as connection:
        return [stand.state for stand in migrations.status(connection, wanted or target(world))]


def test_up_installs_everything_once(every_world: World) -> None:
    world = every_world
    assert states(world) == ["pending"] * FILES
    steps = up(world)
    assert [step.split()[0] for step in steps] == ["apply"] * FILES + ["create", "make", "set"]
    assert states(world) == ["applied"] * FILES
    assert up(world) == []
    slot = find_slot(world.db, world.slot)
    assert slot
    assert (slot.plugin, slot.database, slot.active_pid) == ("pgoutput", world.name, None)


def test_the_seed_statement_works_as_it_stands(every_world: World) -> None:
    up(every_world)
    with psycopg.RawCursor(every_world.db) as cursor:
        cursor.execute(
            "INSERT INTO outbox(id, aggregate_id, event_type, payload, created_at) "
            "VALUES ($1, $2, 'run.created', $3, now());",
            ["11111111-2222-3333-4444-555555555555", "run-1", "{}"],
        )
    row = every_world.db.execute("SELECT aggregate_type, headers FROM outbox").fetchone()
    assert row == ("event", None)


def test_headers_must_be_an_object(every_world: World) -> None:
    up(every_world)
    every_world.insert("t", headers='{"a": "b"}')
    with pytest.raises(psycopg.errors.CheckViolation):
        every_world.insert("t", headers="[]")


def test_the_slot_comes_after_the_publication(every_world: World) -> None:
    """Rows inserted right after `up` must be decodable with the publication."""
    world = every_world
    up(world)
    world.insert("t")
    with ReplicationStream(world.dsn) as stream:
        stream.start(world.slot, "cdc_outbox")
        stream.wait(5)
        stream.receive()
        list(stream.frames())


def test_concurrent_ups_wait_for_each_other(every_world: World) -> None:
    errors: list[BaseException] = []
    done: list[list[str]] = []

    def migrate() -> None:
        try:
            done.append(up(every_world))
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=migrate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(map(len, done)) == [0, 0, 0, FILES + 3]


def test_a_file_changed_after_it_was_applied_is_refused(every_world: World) -> None:
    world = every_world
    up(world)
    world.db.execute("UPDATE cdc_outbox.schema_migration SET sha256 = 'x' WHERE name LIKE '0002%'")
    assert states(world) == ["applied", "changed", *["applied"] * (FILES - 2)]
    with pytest.raises(OperatorNeeded, match=r"0002_outbox_table\.sql was changed"):
        up(world)


def test_sql_prints_what_up_would_run(every_world: World) -> None:
    world = every_world
    with connect(world.dsn) as connection:
        steps = [*migrations.plan(connection, target(world), failover=False), migrations.roles_step()]
        script = "\n".join(step.script for step in steps)
        assert states(world) == ["pending"] * FILES, "printing changes nothing"
        for statement in script.split("COMMIT;"):  # as psql would: not all in one transaction
            connection.execute(f"{statement} COMMIT;".encode() if "BEGIN;" in statement else statement.encode())
    assert states(world) == ["applied"] * FILES
    assert up(world) == []


def test_an_existing_table_by_configuration_alone(every_world: World) -> None:
    world = every_world
    world.db.execute('CREATE SCHEMA "App"')
    world.db.execute('CREATE TABLE "App".outboxevent (id uuid, aggregatetype text, aggregateid text, type text)')
    with pytest.raises(OperatorNeeded, match=r"table App\.outboxevent has no column 'aggregate_id'"):
        up(world, target(world, table='"App".outboxevent', publication="App events"))
    wanted = target(
        world, table='"App".outboxevent', publication="App events", aggregate_id="aggregateid", event_type="type"
    )
    steps = up(world, wanted)
    assert [step.split()[0] for step in steps] == [*["apply"] * (FILES - 2), "create", "create", "make", "set"]
    assert states(world, wanted) == ["applied", "not needed", *["applied"] * (FILES - 3), "not needed"]
    assert world.db.execute("SELECT to_regclass('public.outbox')").fetchone() == (None,)
    table = catalog.find_table(world.db, '"App".outboxevent')
    assert wasteful(check_publication(world.db, "App events", table).publication) == []
    assert up(world, wanted) == []


def test_a_publication_of_another_name(every_world: World) -> None:
    world = every_world
    wanted = target(world, table="outbox", publication="Other")
    assert [step.split()[0] for step in up(world, wanted)] == [
        *["apply"] * (FILES - 1),
        "create",
        "create",
        "make",
        "set",
    ]
    assert states(world, wanted) == [*["applied"] * (FILES - 1), "not needed"]
    assert wasteful(check_publication(world.db, "Other", catalog.find_table(world.db, "outbox")).publication) == []
    assert up(world, wanted) == []


def test_a_publication_that_is_there_gets_the_tables_that_the_relay_hears_of(every_world: World) -> None:
    world = every_world
    world.db.execute("CREATE TABLE events (id uuid, aggregate_id text, event_type text, payload json)")
    world.db.execute("CREATE PUBLICATION mine FOR TABLE events WITH (publish = 'insert')")
    wanted = target(world, table="events", publication="mine")
    assert "add cdc_outbox.request to publication mine" in up(world, wanted)
    assert up(world, wanted) == []
    tables = "SELECT schemaname || '.' || tablename FROM pg_publication_tables WHERE pubname = 'mine' ORDER BY 1"
    assert world.db.execute(tables).fetchall() == [
        ("cdc_outbox.canary",),
        ("cdc_outbox.request",),
        ("public.events",),
    ]


def test_a_table_that_is_not_there_is_named(every_world: World) -> None:
    with pytest.raises(OperatorNeeded, match=r"table app\.nope does not exist"):
        up(every_world, target(every_world, table="app.nope"))


def test_a_publication_younger_than_the_slot_is_not_made(every_world: World) -> None:
    world = every_world
    up(world)
    world.db.execute("DROP PUBLICATION cdc_outbox")
    with pytest.raises(OperatorNeeded, match="is older than publication 'cdc_outbox'"):
        up(world)


def test_failover_slots(every_world: World) -> None:
    world = every_world
    if catalog.server_major(world.db) < FAILOVER_SINCE:
        with pytest.raises(ConfigurationError, match="has no failover slots"):
            up(world, failover=True)
        return
    up(world, failover=True)
    slot = find_slot(world.db, world.slot)
    assert slot
    assert slot.failover is True


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM public.outbox",
        "INSERT INTO public.outbox (aggregate_id, event_type) VALUES ('1', 'x')",
        "DELETE FROM public.outbox",
        "INSERT INTO cdc_outbox.schema_migration VALUES ('x', 'x')",
        "CREATE TABLE cdc_outbox.x ()",
        "DELETE FROM cdc_outbox.parked",
        "INSERT INTO cdc_outbox.request (slot, kind, parked_id) VALUES ('s', 'redrive', 1)",
        "DELETE FROM cdc_outbox.confirmation",
        "DROP PUBLICATION cdc_outbox",
    ],
)
@pytest.mark.parametrize("role", ["cdc_outbox_relay", "cdc_outbox_reader"])
def test_what_neither_role_may_do(every_world: World, role: str, statement: str) -> None:
    up(every_world)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        as_role(every_world, role, statement)


def test_the_reader_reads_the_state_and_nothing_else(every_world: World) -> None:
    world = every_world
    up(world)
    assert as_role(world, "cdc_outbox_reader", "SELECT count(*) FROM cdc_outbox.schema_migration") == [(FILES,)]
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        as_role(world, "cdc_outbox_relay", "SELECT * FROM cdc_outbox.schema_migration")
    assert as_role(world, "cdc_outbox_reader", "SELECT id, topic, reason FROM cdc_outbox.parked") == []
    for secret in ("payload", "headers", "key"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            as_role(world, "cdc_outbox_reader", f"SELECT {secret} FROM cdc_outbox.parked")
    world.db.execute("CREATE TABLE cdc_outbox.later (x int)")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        as_role(world, "cdc_outbox_reader", "SELECT * FROM cdc_outbox.later")
    role = "SELECT rolcanlogin, rolreplication, rolsuper FROM pg_roles WHERE rolname = %s"
    assert world.db.execute(role, ["cdc_outbox_reader"]).fetchone() == (False, False, False)


def test_the_relay_role_streams(every_world: World) -> None:
    world = every_world
    up(world)
    role = "SELECT rolcanlogin, rolreplication, rolsuper, rolcreatedb, rolcreaterole FROM pg_roles WHERE rolname = %s"
    assert world.db.execute(role, ["cdc_outbox_relay"]).fetchone() == (True, True, False, False, False)
    world.db.execute("ALTER ROLE cdc_outbox_relay PASSWORD 'streams'")
    world.insert("t")
    dsn = conninfo.make_conninfo(world.dsn, user="cdc_outbox_relay", password="streams")
    world.db.execute("CREATE SCHEMA app; CREATE TABLE app.events ()")
    world.db.execute("ALTER TABLE app.events ADD COLUMN id uuid")
    with connect(dsn) as connection, ReplicationStream(dsn) as stream:
        check_same_server(connection, stream.identify())
        assert catalog.find_table(connection, "app.events").columns, "without a right to the schema"
        check_publication(connection, "cdc_outbox", catalog.find_table(connection, "public.outbox"))
        check_slot(connection, world.slot)
        stream.start(world.slot, "cdc_outbox")


def test_without_the_right_to_make_roles_the_rest_is_installed(every_world: World) -> None:
    """As on a managed service. The roles of a server are shared, so they are hidden by dropping them meanwhile."""
    world = every_world
    owner = f"{world.name}_owner"
    world.db.execute(f"CREATE ROLE {owner} LOGIN REPLICATION PASSWORD 'x'".encode())
    try:
        world.db.execute(f"ALTER DATABASE {world.name} OWNER TO {owner}".encode())
        world.db.execute(f"GRANT CREATE ON SCHEMA public TO {owner}".encode())
        for role in ("cdc_outbox_relay", "cdc_outbox_reader"):
            world.db.execute(f"ALTER ROLE {role} RENAME TO {role}_hidden".encode()) if role_exists(
                world, role
            ) else None
        as_owner = conninfo.make_conninfo(world.dsn, user=owner, password="x")
        with connect(as_owner) as connection:
            migrations.up(connection, target(world), failover=False, report=lambda _: None)
        assert states(world) == ["applied"] * FILES
        assert not role_exists(world, "cdc_outbox_relay")
    finally:
        for role in ("cdc_outbox_relay", "cdc_outbox_reader"):
            if role_exists(world, f"{role}_hidden"):
                world.db.execute(f"ALTER ROLE {role}_hidden RENAME TO {role}".encode())
        world.db.execute(
            f"REASSIGN OWNED BY {owner} TO CURRENT_USER; DROP OWNED BY {owner}; DROP ROLE {owner}".encode()
        )


def role_exists(world: World, role: str) -> bool:
    return world.db.execute("SELECT FROM pg_roles WHERE rolname = %s", [role]).rowcount > 0


def test_every_file_says_why() -> None:
    files = migrations.load_migrations()
    assert [migration.name[:4] for migration in files] == [f"{number:04}" for number in range(1, len(files) + 1)]
    assert all("-- Why: " in migration.text for migration in files)
    folder = Path(__file__).parents[2] / "sql"
    assert [path.name for path in sorted(folder.iterdir())] == [
        *(migration.name for migration in files),
        "inbox",
        "roles.sql",
    ]
    assert all("-- Why: " in path.read_text() for path in (folder / "inbox").iterdir())


def test_a_slot_that_nobody_has_noted_is_noted(every_world: World) -> None:
    """Made by hand, or by an `up` that was cut off after it."""
    world = every_world
    up(world)
    world.db.execute(
        "DELETE FROM cdc_outbox.settled; DELETE FROM cdc_outbox.coverage; DELETE FROM cdc_outbox.confirmation"
    )
    assert up(world) == [f"note where slot {world.slot} stands"]
    assert up(world) == []
    assert world.db.execute("SELECT complete FROM cdc_outbox.coverage").fetchall() == [(False,)]


def test_the_begin_is_noted_whatever_isolation_the_database_prefers(every_world: World) -> None:
    world = every_world
    world.db.execute(f"ALTER DATABASE {world.name} SET default_transaction_isolation = 'serializable'".encode())
    world.db.execute(
        "CREATE TABLE outbox (id uuid, aggregate_id text, event_type text, payload json, aggregate_type text)"
    )
    steps: list[list[str]] = []
    with psycopg.connect(world.dsn) as open_transaction:
        open_transaction.execute("SET transaction_isolation = 'read committed'")
        open_transaction.execute("INSERT INTO outbox VALUES (gen_random_uuid(), 'before the slot', 't')")
        thread = threading.Thread(target=lambda: steps.append(up(world)))
        thread.start()
        waiting = "SELECT FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
        wait_until(
            lambda: world.db.execute(waiting, [world.name]).rowcount, "the slot waits for it", timeout_seconds=60
        )
        open_transaction.commit()
        thread.join()
    assert steps
    assert world.db.execute("SELECT complete FROM cdc_outbox.coverage").fetchall() == [(False,)]
