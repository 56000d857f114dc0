"""Applications, one a driver: each opens a transaction, nests another in it, emits and consumes, its driver's own way.

All are driven alike, so that one test says of all of them what holds. The asynchronous ones run in a loop of their own.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
import psycopg
import psycopg2
import sqlalchemy as sa
from psycopg import conninfo
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from cdc_outbox.inbox import Message
from cdc_outbox.outbox import Event


class Application:
    """``autocommit``: its connection commits each statement but inside of ``transaction``."""

    def __init__(self, dsn: str, *, autocommit: bool = False) -> None:
        self.dsn = dsn
        self.autocommit = autocommit
        self.stack = ExitStack()
        self.connection: Any = self.connect()

    @property
    def module(self) -> str:
        """Of ``cdc_outbox.outbox`` and ``cdc_outbox.inbox``."""
        raise NotImplementedError

    def connect(self) -> Any:
        raise NotImplementedError

    def transaction(self) -> Any:
        """A context manager, sync or async, of the driver's: the outermost transaction."""
        raise NotImplementedError

    def nested(self) -> Any:
        """One inside it: a savepoint."""
        return self.transaction()

    def execute(self, statement: str) -> None:
        """Some change of the application's."""
        self.finish(self.connection.execute(statement))

    def close(self) -> None:
        self.stack.close()

    def leave_thread(self) -> None:
        """At the end of a thread that used it."""

    def finish(self, result: Any) -> Any:
        return result

    @contextmanager
    def inside(self, manager: Any) -> Iterator[None]:
        with manager:
            yield

    def call(self, method: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        """A method of an Outbox or Inbox, on this connection."""
        return self.finish(method(self.connection, *arguments, **more))


class Asynchronous(Application):
    def __init__(self, dsn: str, *, autocommit: bool = False) -> None:
        self.runner = asyncio.Runner()
        super().__init__(dsn, autocommit=autocommit)

    def finish(self, result: Any) -> Any:
        async def wait(awaitable: Awaitable[Any]) -> Any:
            return await awaitable

        return self.runner.run(wait(result))

    @contextmanager
    def inside(self, manager: AbstractAsyncContextManager[Any]) -> Iterator[None]:
        self.finish(manager.__aenter__())
        try:
            yield
        except BaseException as error:
            if not self.finish(manager.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            self.finish(manager.__aexit__(None, None, None))

    def close(self) -> None:
        self.stack.close()
        self.runner.close()


class Psycopg(Application):
    module = "psycopg"

    def connect(self) -> Any:
        return self.stack.enter_context(psycopg.connect(self.dsn, autocommit=self.autocommit))

    def transaction(self) -> Any:
        return self.connection.transaction()


class AsyncPsycopg(Asynchronous):
    module = "psycopg"

    def connect(self) -> Any:
        connection = self.finish(psycopg.AsyncConnection.connect(self.dsn, autocommit=self.autocommit))
        self.stack.callback(lambda: self.finish(connection.close()))
        return connection

    def transaction(self) -> Any:
        return self.connection.transaction()


class Asyncpg(Asynchronous):
    module = "asyncpg"

    def connect(self) -> Any:
        connection = self.finish(asyncpg.connect(url(self.dsn, "postgresql")))
        self.stack.callback(lambda: self.finish(connection.close()))
        return connection

    def transaction(self) -> Any:
        return self.connection.transaction()


class SqlalchemyConnection(Application):
    module = "sqlalchemy"
    driver = "psycopg"

    def connect(self) -> Any:
        engine = sa.create_engine(url(self.dsn, f"postgresql+{self.driver}"), poolclass=NullPool, **self.engine_options)
        return self.stack.enter_context(engine.connect())

    @property
    def engine_options(self) -> dict[str, Any]:
        return {"isolation_level": "AUTOCOMMIT"} if self.autocommit else {}

    def transaction(self) -> Any:
        return self.connection.begin()

    def nested(self) -> Any:
        return self.connection.begin_nested()

    def execute(self, statement: str) -> None:
        self.connection.execute(sa.text(statement))


class SqlalchemyPsycopg2(SqlalchemyConnection):
    driver = "psycopg2"


class SqlalchemySession(SqlalchemyConnection):
    def connect(self) -> Any:
        engine = sa.create_engine(url(self.dsn, "postgresql+psycopg"), poolclass=NullPool, **self.engine_options)
        return self.stack.enter_context(Session(engine))


class SqlalchemyAsyncConnection(Asynchronous):
    module = "sqlalchemy"
    driver = "asyncpg"

    def engine(self) -> Any:
        options: dict[str, Any] = {"isolation_level": "AUTOCOMMIT"} if self.autocommit else {}
        return create_async_engine(url(self.dsn, f"postgresql+{self.driver}"), poolclass=NullPool, **options)

    def connect(self) -> Any:
        connection = self.engine().connect()
        self.finish(connection.start())
        self.stack.callback(lambda: self.finish(connection.close()))
        return connection

    def transaction(self) -> Any:
        return self.connection.begin()

    def nested(self) -> Any:
        return self.connection.begin_nested()

    def execute(self, statement: str) -> None:
        self.finish(self.connection.execute(sa.text(statement)))


class SqlalchemyAsyncSession(SqlalchemyAsyncConnection):
    driver = "psycopg"

    def connect(self) -> Any:
        session = AsyncSession(self.engine())
        self.stack.callback(lambda: self.finish(session.close()))
        return session


class Psycopg2(Application):
    module = "dbapi"

    def connect(self) -> Any:
        connection = psycopg2.connect(self.dsn)
        connection.autocommit = self.autocommit
        self.stack.callback(connection.close)
        return connection

    def transaction(self) -> Any:
        return self.connection

    @contextmanager
    def nested(self) -> Iterator[None]:
        self.execute("SAVEPOINT inner_one")
        try:
            yield
        except BaseException:
            self.execute("ROLLBACK TO SAVEPOINT inner_one")
            raise
        self.execute("RELEASE SAVEPOINT inner_one")

    def execute(self, statement: str) -> None:
        with self.connection.cursor() as cursor:
            cursor.execute(statement)


class Django(Application):
    """A connection of Django is an alias; each application of a test has its own."""

    module = "django"

    def connect(self) -> Any:
        connections = django_connections()
        parts = {name: str(value) for name, value in conninfo.conninfo_to_dict(self.dsn).items()}
        alias = f"app_{parts['dbname']}"
        connections.settings[alias] = connections.configure_settings(
            {
                "default": {},
                alias: {
                    "ENGINE": "django.db.backends.postgresql",
                    "NAME": parts.pop("dbname"),
                    "HOST": parts.pop("host"),
                    "PORT": parts.pop("port"),
                    "USER": parts.pop("user"),
                    "PASSWORD": parts.pop("password", ""),
                },
            }
        )[alias]
        self.stack.callback(connections[alias].close)
        return alias

    def transaction(self) -> Any:
        from django.db import transaction

        return transaction.atomic(using=self.connection)

    def execute(self, statement: str) -> None:
        with django_connections()[self.connection].cursor() as cursor:
            cursor.execute(statement)

    def call(self, method: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        return method(*arguments, **more, using=self.connection)

    def leave_thread(self) -> None:
        django_connections()[self.connection].close()  # each thread has one of its own


#: Makes an application of a kind: ``start(kind, autocommit=False)``.
Start: TypeAlias = Callable[..., Application]

ALL: list[type[Application]] = [
    Psycopg,
    AsyncPsycopg,
    Asyncpg,
    SqlalchemyConnection,
    SqlalchemyPsycopg2,
    SqlalchemySession,
    SqlalchemyAsyncConnection,
    SqlalchemyAsyncSession,
    Psycopg2,
    Django,
]


@cache
def django_connections() -> Any:
    """Django, set up for the whole process: it cannot be twice."""
    import django
    from django.conf import settings
    from django.db import connections

    if not settings.configured:
        settings.configure(
            DATABASES={},
            INSTALLED_APPS=["cdc_outbox.outbox.django", "cdc_outbox.inbox.django"],
            USE_TZ=True,
            DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        )
    django.setup()
    return connections


def url(dsn: str, scheme: str) -> str:
    """``dsn`` as a URL, as all but libpq's own want it."""
    parts = {name: str(value) for name, value in conninfo.conninfo_to_dict(dsn).items()}
    return sa.URL.create(
        scheme,
        parts.get("user"),
        parts.get("password"),
        parts.get("host"),
        int(parts.get("port", 5432)),
        parts["dbname"],
    ).render_as_string(hide_password=False)


def make_emit(application: Application, **options: Any) -> Callable[..., UUID]:
    """``emit`` of this application's Outbox."""
    outbox = _class(application, "outbox", "Outbox")(**options)
    return lambda event: application.call(outbox.emit, event)


def make_emit_many(application: Application, **options: Any) -> Callable[[Iterable[Event]], list[UUID]]:
    outbox = _class(application, "outbox", "Outbox")(**options)
    return lambda events: application.call(outbox.emit_many, events)


def a_message(message_id: str = "0190163d-8694-739b-aea5-966c26f8ad91", **more: Any) -> Message:
    return Message(message_id, **{"committed_at": datetime.now(UTC), **more})


class Consumer:
    """The Inbox of an application."""

    def __init__(self, application: Application, consumer: str, **options: Any) -> None:
        self._application = application
        self._inbox = _class(application, "inbox", "Inbox")(consumer, **options)

    def once(self, message: Any) -> bool:
        return bool(self._application.call(self._inbox.once, message))

    def once_many(self, messages: Any) -> list[Any]:
        return list(self._application.call(self._inbox.once_many, messages))

    def prune(self, older_than: timedelta) -> int:
        return int(self._application.call(self._inbox.prune, older_than))

    def call(self, name: str, *arguments: Any, **more: Any) -> Any:
        """Any of its methods, on the application's connection."""
        return self._application.call(getattr(self._inbox, name), *arguments, **more)

    def store(self, request: Any, response: Any) -> Any:
        return self._application.finish(request.store(response))


def _class(application: Application, package: str, name: str) -> Any:
    from importlib import import_module

    module = import_module(f"cdc_outbox.{package}.{application.module}")
    return getattr(module, f"Async{name}" if isinstance(application, Asynchronous) else name)
