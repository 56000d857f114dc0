"""The inbox through every driver: one effect a message, whatever comes again; and its table, made in every way."""

import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from cdc_outbox.inbox import Message, NoTransaction, OpenTransaction
from cdc_outbox.inbox import schema as inbox_sql
from cdc_outbox.outbox import Event
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
from support.inboxes import is_waiting
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
