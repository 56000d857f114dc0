"""The tables of an inbox: partitions by day, and how each is made."""

import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from cdc_outbox.inbox import Message
from cdc_outbox.inbox import schema as inbox_sql
from cdc_outbox.inbox.table import _drop
from cdc_outbox.transactions.psycopg import run_alone
from support.applications import (
    Application,
    Consumer,
    Django,
    Psycopg,
    Start,
    a_message,
    django_connections,
    url,
)
from support.command import run
from support.inboxes import is_waiting
from support.waiting import wait_until
from support.world import World


class TestPartitions:
    @pytest.fixture
    def consuming(self, world: World) -> World:
        world.db.execute(inbox_sql.sql(partitioned=True).encode())
        for day in (3, 2):
            world.db.execute(
                f"""DO $$ BEGIN EXECUTE format('CREATE TABLE day_{day} PARTITION OF inbox FOR VALUES FROM (%L) TO (%L)',
                    current_date - {day}, current_date - {day - 1}); END $$"""
            )
        return world

    def fill(self, world: World, application: Application) -> dict[str, Message]:
        """One message a partition, each processed a day later at most."""
        noon = datetime.now(UTC).replace(hour=12, minute=0)
        messages = {f"day-{day}": a_message(f"day-{day}", committed_at=noon - timedelta(days=day)) for day in (2, 3)}
        with application.inside(application.transaction()):
            Consumer(application, "billing").once_many(messages.values())
        world.db.execute("UPDATE inbox SET processed_at = now() - interval '3 days' WHERE message_id = 'day-3'")
        return messages

    def partitions(self, world: World) -> set[str]:
        rows = world.db.execute("SELECT relid::regclass::text FROM pg_partition_tree('inbox') WHERE isleaf")
        return {name for (name,) in rows if name.startswith("day")}

    def test_past_ones_are_dropped(self, consuming: World, start: Start) -> None:
        application = start()
        self.fill(consuming, application)
        inbox = Consumer(application, "billing")
        assert inbox.prune(timedelta(days=30)) == 0
        assert self.partitions(consuming) == {"day_2", "day_3"}
        assert inbox.prune(timedelta(days=2)) == 0  # what is dropped is not counted
        assert self.partitions(consuming) == {"day_2"}

    def test_one_with_another_consumers_rows_stays(self, consuming: World, start: Start) -> None:
        application = start()
        messages = self.fill(consuming, application)
        with application.inside(application.transaction()):
            Consumer(application, "shipping").once(messages["day-3"])
        consuming.db.execute("UPDATE inbox SET processed_at = now() - interval '3 days'")  # of both
        assert Consumer(application, "billing").prune(timedelta(days=2)) == 2
        assert self.partitions(consuming) == {"day_2", "day_3"}

    def test_one_in_which_a_message_was_handled_late_stays(self, consuming: World, start: Start) -> None:
        application = start()
        messages = self.fill(consuming, application)
        with application.inside(application.transaction()):
            assert Consumer(application, "billing").once(replace(messages["day-3"], id="late"))
        assert Consumer(application, "billing").prune(timedelta(days=2)) == 1
        assert self.partitions(consuming) == {"day_2", "day_3"}
        with application.inside(application.transaction()):
            assert not Consumer(application, "billing").once(replace(messages["day-3"], id="late"))

    def test_a_busy_one_is_left_for_another_time(self, consuming: World, start: Start) -> None:
        """And nobody waits for us long."""
        application, busy = start(), start()
        messages = self.fill(consuming, application)
        with busy.inside(busy.transaction()):
            Consumer(busy, "billing").once(replace(messages["day-2"], id="another"))
            started = time.monotonic()
            Consumer(application, "billing").prune(timedelta(days=2))
            assert time.monotonic() - started < 5
            assert self.partitions(consuming) == {"day_2", "day_3"}
        Consumer(application, "billing").prune(timedelta(days=2))
        assert self.partitions(consuming) == {"day_2"}

    @pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
    def test_what_is_committed_while_it_waits_keeps_it(self, consuming: World, start: Start, isolation: str) -> None:
        """Whatever isolation the database has by default: the second look must not be at an old snapshot."""
        application, busy = start(), start()
        messages = self.fill(consuming, application)
        setting = f"ALTER DATABASE {consuming.name} SET default_transaction_isolation = '{isolation}'"
        consuming.db.execute(setting.encode())
        drop = _drop("public.day_3", "billing", 2 * 86_400)
        patient = replace(drop, before=drop.before.replace("'50ms'", "'20s'"))
        assert patient != drop

        def prune() -> None:
            with psycopg.connect(consuming.dsn, autocommit=True) as connection:
                run_alone(connection, patient, None)

        pruning = threading.Thread(target=prune)
        with busy.inside(busy.transaction()):
            Consumer(busy, "billing").once(replace(messages["day-3"], id="late"))
            pruning.start()
            wait_until(lambda: is_waiting(consuming), "it waits for the partition")
        pruning.join()
        assert self.partitions(consuming) == {"day_2", "day_3"}

    def test_the_coming_days_are_made_beside_consumers(self, consuming: World, start: Start) -> None:
        """A transaction of a consumer's that lasts holds up neither that nor others."""
        busy, other = start(), start()
        for (name,) in consuming.db.execute(
            "SELECT relid::regclass::text FROM pg_partition_tree('inbox') WHERE relid::regclass::text ~ '_20'"
            " ORDER BY 1 DESC LIMIT 3"
        ).fetchall():
            consuming.db.execute(f"DROP TABLE {name}".encode())
        with busy.inside(busy.transaction()):
            Consumer(busy, "billing").once(a_message("today"))
            made = run(consuming.environment, "migrate", "inbox", "up", "--partitioned")
            assert made.exit_code == 0
            assert len(made.out.splitlines()) == 3
            with other.inside(other.transaction()):
                assert Consumer(other, "billing").once(a_message("too"))


class TestTables:
    """The same table, whoever makes it."""

    COLUMNS = """
        SELECT attname::text, format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid)
          FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
         WHERE attrelid = %(table)s::regclass AND attnum > 0 ORDER BY attnum"""
    INDEXES = "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = %(table)s::regclass ORDER BY 1"
    SUFFIXES = ("", *(f"_{name}" for name in inbox_sql.BESIDE))
    KIND = "SELECT relkind::text, pg_get_partkeydef(oid) FROM pg_class WHERE oid = %(table)s::regclass"

    def shape(self, world: World, table: str = "public.inbox") -> list[Any]:
        return [world.db.execute(q, {"table": table}).fetchall() for q in (self.COLUMNS, self.INDEXES, self.KIND)]

    def all_shapes(self, world: World) -> list[Any]:
        return [self.shape(world, f"public.inbox{suffix}") for suffix in self.SUFFIXES] + [
            world.db.execute(
                "SELECT conrelid::regclass::text, conname::text, pg_get_constraintdef(oid) FROM pg_constraint"
                " WHERE conrelid = ANY (%s::regclass[]) AND contype IN ('c', 'u', 'p') ORDER BY 1, 2",
                [[f"inbox_{name}" for name in inbox_sql.BESIDE]],
            ).fetchall(),
            world.db.execute("SELECT relname, reloptions FROM pg_class WHERE relname = 'inbox_version'").fetchall(),
        ]

    @pytest.fixture(params=["", "partitioned"], ids=["plain", "partitioned"])
    def partitioned(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def test_of_sqlalchemy(self, world: World, partitioned: str) -> None:
        import sqlalchemy as sa

        from cdc_outbox.inbox.sqlalchemy import inbox_tables

        metadata = sa.MetaData()
        table, *others = inbox_tables(metadata, partitioned=bool(partitioned))
        engine = sa.create_engine(url(world.dsn, "postgresql+psycopg"))
        metadata.create_all(engine)
        made = self.all_shapes(world)
        metadata.drop_all(engine)
        engine.dispose()
        world.db.execute(inbox_sql.sql(partitioned=bool(partitioned)).encode())
        assert made == self.all_shapes(world)
        assert [other.name for other in others] == [f"inbox_{name}" for name in inbox_sql.BESIDE]
        assert inbox_tables(sa.MetaData(), table="app.inbox")[0].schema == "app"
        assert table.schema is None

    def test_of_django(self, world: World) -> None:
        from django.core.management import call_command

        application = Django(world.dsn)
        call_command("migrate", database=application.connection, verbosity=0, interactive=False)
        made = self.all_shapes(world)
        events = world.db.execute(self.COLUMNS, {"table": "public.outbox"}).fetchall()
        call_command("migrate", "cdc_outbox_inbox", "zero", database=application.connection, verbosity=0)
        django_connections()[application.connection].close()
        application.close()
        world.db.execute(inbox_sql.sql().encode())
        assert made == self.all_shapes(world)
        world.migrate()  # the relay's side comes on top of the table that Django made
        assert events == world.db.execute(self.COLUMNS, {"table": "public.outbox"}).fetchall()

    def test_of_the_command(self, every_world: World, partitioned: str) -> None:
        world = every_world
        option = ["--partitioned"] if partitioned else []
        done = run(world.environment, "migrate", "inbox", "up", *option)
        assert (done.exit_code, done.err) == (0, "")
        assert done.out.splitlines()[0] == "make table inbox"
        assert len(done.out.splitlines()) == (22 if partitioned else 5)
        made = self.all_shapes(world)
        again = run(world.environment, "migrate", "inbox", "up", *option)
        assert (again.exit_code, again.out) == (0, "nothing to do\n")
        script = run(world.environment, "migrate", "inbox", "sql", *option)
        assert script.exit_code == 0
        world.db.execute("DROP TABLE inbox, inbox_parked, inbox_attempt, inbox_version, inbox_request")
        world.db.execute(script.out.encode())
        assert self.all_shapes(world) == made

    def test_of_another_name(self, world: World, partitioned: str) -> None:
        world.db.execute('CREATE SCHEMA "It\'s % mine"')
        table = '"It\'s % mine"."In box"'
        option = ["--partitioned"] if partitioned else []
        done = run(world.environment, "migrate", "inbox", "up", "--table", table, *option)
        assert (done.exit_code, done.err) == (0, "")
        again = run(world.environment, "migrate", "inbox", "up", "--table", table, *option)
        assert (again.exit_code, again.out) == (0, "nothing to do\n")
        application = Psycopg(world.dsn)
        inbox = Consumer(application, "billing", table=table)
        with application.inside(application.transaction()):
            assert inbox.once(a_message("x"))
            inbox.call("park", a_message("y"), "broken")
            assert inbox.call("newer", a_message("z", key="k"), version=1)
            inbox.store(inbox.call("request", "a-key", b""), {})
        assert inbox.prune(timedelta()) == 2  # an id and a request; what is parked stays, with its id
        application.close()

    def test_a_table_that_is_something_else_is_not_touched(self, world: World) -> None:
        world.db.execute("CREATE TABLE inbox (mail text)")
        refused = run(world.environment, "migrate", "inbox", "up")
        assert refused.exit_code == 3
        assert 'table "public"."inbox" is there, and it is not the inbox' in refused.err
        assert "--table" in refused.err
        world.db.execute("DROP TABLE inbox")
        world.db.execute(inbox_sql.sql().encode())
        refused = run(world.environment, "migrate", "inbox", "up", "--partitioned")
        assert refused.exit_code == 3
        assert "not partitioned" in refused.err
        world.db.execute("ALTER TABLE inbox DROP CONSTRAINT inbox_pkey")
        refused = run(world.environment, "migrate", "inbox", "up")
        assert refused.exit_code == 3
        assert "has no unique key (consumer, source, message_id)" in refused.err
        long = run(world.environment, "migrate", "inbox", "up", "--partitioned", "--table", "x" * 55)
        assert long.exit_code == 3
        assert "is too long" in long.err
        nowhere = run(world.environment, "migrate", "inbox", "up", "--table", "nowhere.inbox")
        assert nowhere.exit_code == 3
        assert 'schema "nowhere" does not exist -- make the schema first' in nowhere.err
        long = run(world.environment, "migrate", "inbox", "up", "--table", "x" * 56)
        assert long.exit_code == 2
        assert "is too long" in long.err
        world.db.execute("ALTER TABLE inbox ADD PRIMARY KEY (consumer, source, message_id)")
        world.db.execute("DROP TABLE inbox_version; CREATE TABLE inbox_version (of_what text)")
        refused = run(world.environment, "migrate", "inbox", "up")
        assert refused.exit_code == 3
        assert 'table "public"."inbox_version" is there' in refused.err
        wrong = run(world.environment, "migrate", "inbox", "sql", "--table", "a.b.c")
        assert wrong.exit_code == 2
        assert "'a.b.c' is not a table name" in wrong.err

    def test_a_day_that_the_default_partition_has_rows_of(self, world: World) -> None:
        world.db.execute(inbox_sql.sql(partitioned=True).encode())
        (name,) = world.db.execute(
            "SELECT inhrelid::regclass::text FROM pg_inherits"
            " WHERE inhparent = 'inbox'::regclass AND inhrelid::regclass::text LIKE '%'"
            " || to_char(now() AT TIME ZONE 'UTC', 'YYYYMMDD')"
        ).fetchone() or ("",)
        world.db.execute(f"DROP TABLE {name}".encode())
        application = Psycopg(world.dsn)
        with application.inside(application.transaction()):
            assert Consumer(application, "billing").once(a_message())
        assert run(world.environment, "migrate", "inbox", "up", "--partitioned").out == "nothing to do\n"
        application.close()
