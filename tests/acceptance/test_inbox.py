"""The inbox through every driver: one effect a message, whatever comes again; and its table, made in every way."""

import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from cdc_outbox.inbox import Message, NoTransaction, OpenTransaction
from cdc_outbox.inbox import schema as inbox_sql
from cdc_outbox.inbox.table import _drop
from cdc_outbox.outbox import Event
from cdc_outbox.transactions.psycopg import run_alone
from support.applications import (
    ALL,
    Application,
    Asyncpg,
    AsyncPsycopg,
    Consumer,
    Django,
    Psycopg,
    Psycopg2,
    SqlalchemyAsyncConnection,
    Start,
    a_message,
    django_connections,
    make_emit,
    url,
)
from support.command import run
from support.waiting import wait_until
from support.world import World, make_world

WEEK = timedelta(days=7)


def effects(world: World) -> list[str]:
    return [message_id for (message_id,) in world.db.execute("SELECT message_id FROM effect ORDER BY ctid")]


def handle(application: Application, inbox: Consumer, message: Message) -> bool:
    with application.inside(application.transaction()):
        if not inbox.once(message):
            return False
        application.execute(f"INSERT INTO effect VALUES ('{message.id}')")
        return True


every_driver = pytest.mark.parametrize("kind", ALL)


@every_driver
def test_a_message_is_new_once(consuming: World, start: Start, kind: type[Application]) -> None:
    application = start(kind)
    inbox = Consumer(application, "billing")
    message = a_message("one %s :x ? $1 'é")
    assert handle(application, inbox, replace(message, id="one"))
    assert not handle(application, inbox, replace(message, id="one"))
    with application.inside(application.transaction()):
        assert inbox.once(message)
    with application.inside(application.transaction()):
        assert not inbox.once(message)
        assert Consumer(application, "shipping").once(message)  # another consumer has its own
        assert inbox.once(replace(message, source="elsewhere"))  # and so has another source
    assert effects(consuming) == ["one"]


@every_driver
def test_what_is_rolled_back_is_new_again(consuming: World, start: Start, kind: type[Application]) -> None:
    application = start(kind)
    inbox = Consumer(application, "billing")
    message = a_message()
    with pytest.raises(ZeroDivisionError), application.inside(application.transaction()):
        assert inbox.once(message)
        application.execute("INSERT INTO effect VALUES ('undone')")
        1 / 0  # noqa: B018
    with application.inside(application.transaction()):
        with pytest.raises(ZeroDivisionError), application.inside(application.nested()):
            assert inbox.once(message)
            1 / 0  # noqa: B018
        assert inbox.once(message)
    assert effects(consuming) == []


@every_driver
def test_many_at_once(consuming: World, start: Start, kind: type[Application]) -> None:
    application = start(kind)
    inbox = Consumer(application, "billing")
    messages = [a_message(name) for name in "dbac"]
    with application.inside(application.transaction()):
        assert inbox.once_many([]) == []
        assert inbox.once_many(messages[:2]) == messages[:2]
        assert inbox.once_many(iter([*messages, *messages])) == messages[2:]
        assert inbox.once_many(messages) == []


@every_driver
def test_without_a_transaction_it_is_refused(consuming: World, start: Start, kind: type[Application]) -> None:
    inbox = Consumer(start(kind, autocommit=True), "billing")
    with pytest.raises(NoTransaction):
        inbox.once(a_message())
    assert consuming.db.execute("SELECT FROM inbox").rowcount == 0


@every_driver
def test_old_ones_are_forgotten(consuming: World, start: Start, kind: type[Application]) -> None:
    application = start(kind)
    inbox, other = Consumer(application, "it's % billing"), Consumer(application, "shipping")
    now = datetime.now(UTC)
    with application.inside(application.transaction()):
        inbox.once_many([a_message(f"old-{number}", committed_at=now - timedelta(days=30)) for number in range(500)])
        inbox.once_many([a_message("fresh")])
        other.once(a_message("old-0"))
    consuming.db.execute("UPDATE inbox SET processed_at = now() - interval '8 days' WHERE message_id LIKE 'old%'")
    assert inbox.prune(WEEK) == 500
    assert inbox.prune(WEEK) == 0
    left = consuming.db.execute("SELECT consumer, message_id FROM inbox ORDER BY 1").fetchall()
    assert left == [("it's % billing", "fresh"), ("shipping", "old-0")]
    with application.inside(application.transaction()):
        assert inbox.once(a_message("old-0"))
        if kind is not Psycopg2 or application.connection.get_transaction_status():
            with pytest.raises(OpenTransaction):
                inbox.prune(WEEK)
    with pytest.raises(ValueError, match="nothing was processed in the future"):
        inbox.prune(-WEEK)


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


ISOLATION = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]


@pytest.mark.parametrize("isolation", ISOLATION)
@pytest.mark.parametrize("first_ends", ["commit", "rollback"])
def test_two_sessions_have_the_same_message_at_once(consuming: World, isolation: str, first_ends: str) -> None:
    """One effect. The second waits for the first, and then has it, has it not, or is told to try again."""
    from cdc_outbox.inbox.psycopg import Inbox

    inbox, message = Inbox("billing"), a_message()
    tries: list[str] = []

    def second() -> None:
        with psycopg.connect(consuming.dsn) as connection:
            connection.execute(f"SET default_transaction_isolation = '{isolation.lower()}'".encode())
            connection.commit()
            while True:
                try:
                    with connection.transaction():
                        connection.execute("SELECT 1")  # the snapshot of this transaction is taken
                        if inbox.once(connection, message):
                            connection.execute("INSERT INTO effect VALUES ('second')")
                            tries.append("new")
                        else:
                            tries.append("duplicate")
                except psycopg.errors.SerializationFailure:
                    tries.append("try again")
                else:
                    return

    with psycopg.connect(consuming.dsn) as connection:
        connection.execute(f"SET default_transaction_isolation = '{isolation.lower()}'".encode())
        connection.commit()
        assert inbox.once(connection, message)
        connection.execute("INSERT INTO effect VALUES ('first')")
        thread = threading.Thread(target=second)
        thread.start()
        wait_until(lambda: is_waiting(consuming), "the second session waits")
        assert tries == []
        if first_ends == "commit":
            connection.commit()
        else:
            connection.rollback()
        thread.join()
    if first_ends == "rollback":
        assert (tries, effects(consuming)) == (["new"], ["second"])
    elif isolation == "READ COMMITTED":
        assert (tries, effects(consuming)) == (["duplicate"], ["first"])
    else:
        assert (tries, effects(consuming)) == (["try again", "duplicate"], ["first"])


def is_waiting(world: World) -> bool:
    query = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    return world.db.execute(query).rowcount > 0


def test_batches_in_other_orders_do_not_wait_for_each_other(consuming: World) -> None:
    """Each writes in the order of the ids: one that waits for the first holds none of the later ones."""
    from cdc_outbox.inbox.psycopg import Inbox

    inbox = Inbox("billing")
    first, second = a_message("1"), a_message("2")
    new: list[Message] = []

    def other() -> None:
        with psycopg.connect(consuming.dsn) as connection:
            new.extend(inbox.once_many(connection, [second, first]))

    with psycopg.connect(consuming.dsn) as connection:
        assert inbox.once(connection, first)
        thread = threading.Thread(target=other)
        thread.start()
        wait_until(lambda: is_waiting(consuming), "the other one waits")
        connection.execute("SET LOCAL lock_timeout = '1s'")
        assert inbox.once(connection, second)
        connection.commit()
        thread.join()
    assert new == []


def test_rows_that_are_locked_are_passed_over(consuming: World, start: Start) -> None:
    """By another cleaner, say: it deletes them."""
    application = start()
    inbox = Consumer(application, "billing")
    with application.inside(application.transaction()):
        inbox.once_many([a_message("1"), a_message("2")])
    with psycopg.connect(consuming.dsn) as other:
        other.execute("SELECT FROM inbox WHERE message_id = '1' FOR UPDATE")
        assert inbox.prune(timedelta()) == 1
    assert inbox.prune(timedelta()) == 1


def test_psycopg2_begins_one_inside_of_with(consuming: World) -> None:
    """In autocommit mode too; with the first statement, which is ours."""
    from cdc_outbox.inbox.dbapi import Inbox

    application = Psycopg2(consuming.dsn, autocommit=True)
    message = a_message()
    with pytest.raises(ZeroDivisionError), application.connection:
        assert Inbox("billing").once(application.connection, message)
        1 / 0  # noqa: B018
    with application.connection:
        assert Inbox("billing").once(application.connection, message)
    with pytest.raises(NoTransaction):
        Inbox("billing").once(application.connection, message)
    application.close()


def test_a_pipeline_hides_no_answer(consuming: World) -> None:
    from cdc_outbox.inbox.psycopg import Inbox

    message = a_message()
    with psycopg.connect(consuming.dsn) as connection, connection.pipeline():
        assert Inbox("billing").once(connection, message)
        assert not Inbox("billing").once(connection, message)


def test_a_pipeline_without_a_transaction_is_refused(consuming: World) -> None:
    from cdc_outbox.inbox.psycopg import Inbox

    with psycopg.connect(consuming.dsn, autocommit=True) as connection, connection.pipeline():
        connection.execute("SELECT 1")
        with pytest.raises(NoTransaction):
            Inbox("billing").once(connection, a_message())
        with connection.transaction():
            assert Inbox("billing").once(connection, a_message())


#: psycopg 3 gives text back as bytes in SQL_ASCII; SQLAlchemy and Django over it do not start, psycopg2 sends ASCII.
BYTES_FOR_TEXT = [Psycopg, AsyncPsycopg, Asyncpg, SqlalchemyAsyncConnection]


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_databases_in_other_encodings(postgres: str, kafka: str, encoding: str) -> None:
    with make_world(postgres, kafka, encoding=encoding) as world:
        world.migrate()
        for table in ("public.inbox", '"Zwölf".inbox'):
            world.db.execute('CREATE SCHEMA IF NOT EXISTS "Zwölf"')
            world.db.execute(inbox_sql.sql(table))
            for kind in BYTES_FOR_TEXT if encoding == "SQL_ASCII" else ALL:
                application = kind(world.dsn)
                inbox, message = Consumer(application, f"é {kind.__name__}", table=table), a_message("é")
                with application.inside(application.transaction()):
                    make_emit(application)(Event("opened", "é", {"é": 1}))
                    assert inbox.once(message)
                    assert not inbox.once(message)
                assert inbox.prune(timedelta()) == 1
                application.close()


def test_a_topic_that_stamps_records_itself(consuming: World) -> None:
    """Each copy has another time there, and a partitioned inbox would take it for new."""
    from cdc_outbox.inbox.psycopg import Inbox

    message = a_message(committed_at=None)
    partitioned = consuming.db.execute("SELECT FROM pg_class WHERE relname = 'inbox' AND relkind = 'p'").rowcount
    with psycopg.connect(consuming.dsn) as connection:
        if partitioned:
            with pytest.raises(psycopg.errors.NotNullViolation):
                Inbox("billing").once(connection, message)
        else:
            assert Inbox("billing").once(connection, message)
            assert not Inbox("billing").once(connection, message)


def test_a_connection_of_djangos_given_to_another_module_is_refused(consuming: World) -> None:
    """It knows of its autocommit only when it has connected."""
    from cdc_outbox.inbox.dbapi import Inbox

    application = Django(consuming.dsn)
    connection = django_connections()[application.connection]
    with pytest.raises(NoTransaction):
        Inbox("billing").once(connection, a_message())
    application.close()


def test_djangos_own_transaction_around_a_test_does_not_count(consuming: World) -> None:
    from django.db import transaction

    application = Django(consuming.dsn)
    inbox = Consumer(application, "billing")
    around = transaction.atomic(using=application.connection)
    around._from_testcase = True  # as TestCase does
    with around:
        with pytest.raises(NoTransaction):
            inbox.once(a_message())
        with transaction.atomic(using=application.connection):
            assert inbox.once(a_message())
    application.close()


def test_a_session_of_several_databases_is_refused(consuming: World) -> None:
    """It would write the change to one and the id to another."""
    import sqlalchemy as sa
    from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

    from cdc_outbox.inbox.sqlalchemy import Inbox

    class Base(DeclarativeBase):
        pass

    class Order(Base):
        __tablename__ = "orders"
        id: Mapped[int] = mapped_column(primary_key=True)

    message = a_message()
    one, two = (sa.create_engine(url(consuming.dsn, "postgresql+psycopg")) for _ in range(2))
    with Session(one, binds={Order: two}) as session:
        with pytest.raises(ValueError, match="several databases"):
            Inbox("billing").once(session, a_message())
        assert Inbox("billing").once(session.connection(bind_arguments={"mapper": Order}), message)
        session.commit()
    with Session(binds={Order: two}) as session:  # of one database
        assert not Inbox("billing").once(session, message)

    class Routing(Session):
        """As Flask-SQLAlchemy does it, by the class that is asked for."""

        def get_bind(self, mapper: Any = None, **more: Any) -> Any:
            return two if mapper else super().get_bind(mapper, **more)

    Base.metadata.create_all(two)
    with Routing(one) as session:
        session.add(Order(id=1))
        session.flush()
        with pytest.raises(ValueError, match="several databases"):
            Inbox("billing").once(session, a_message())
    one.dispose()
    two.dispose()


def test_rows_that_are_dictionaries(consuming: World) -> None:
    import psycopg2.extras

    from cdc_outbox.inbox.dbapi import Inbox

    connection = psycopg2.connect(consuming.dsn, cursor_factory=psycopg2.extras.RealDictCursor)
    message = a_message()
    with connection:
        assert Inbox("billing").once(connection, message)
        assert not Inbox("billing").once(connection, message)
    connection.close()


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
