"""``emit`` through every driver: what commits with the caller's transaction, and what must not be written at all."""

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from cdc_outbox.outbox import Event, EventRefused, NoTransaction
from support.applications import ALL, Application, Django, Psycopg, Psycopg2, make_emit, make_emit_many
from support.world import World, make_world

Start = Callable[..., Application]


@pytest.fixture
def migrated(world: World) -> World:
    world.migrate()
    world.db.execute("CREATE TABLE account (id text PRIMARY KEY)")
    return world


@pytest.fixture(params=ALL)
def start(request: pytest.FixtureRequest, migrated: World) -> Iterator[Start]:
    started: list[Application] = []

    def start(world: World = migrated, **options: Any) -> Application:
        started.append(request.param(world.dsn, **options))
        return started[-1]

    yield start
    for application in started:
        application.close()


def events(world: World) -> list[str]:
    return [kind for (kind,) in world.db.execute("SELECT event_type FROM outbox ORDER BY ctid")]


def an_event(kind: str = "account.opened", **more: Any) -> Event:
    return Event(kind, "a-1", **{"payload": {"amount": 1.5, "who": "Zoë"}, **more})


def test_it_commits_with_the_change(migrated: World, start: Start) -> None:
    application = start()
    event = an_event(headers={"tenant": "é"}, aggregate_type="account")
    with application.inside(application.transaction()):
        application.execute("INSERT INTO account VALUES ('a-1')")
        assert make_emit(application)(event) == event.id
        assert events(migrated) == []
    row = migrated.db.execute(
        "SELECT id, aggregate_type, aggregate_id, event_type, payload::text, headers, created_at IS NOT NULL"
        " FROM outbox"
    ).fetchone()
    payload = '{"amount":1.5,"who":"Zoë"}'
    assert row == (event.id, "account", "a-1", "account.opened", payload, {"tenant": "é"}, True)


def test_it_is_rolled_back_with_the_change(migrated: World, start: Start) -> None:
    application = start()
    with pytest.raises(ZeroDivisionError), application.inside(application.transaction()):
        application.execute("INSERT INTO account VALUES ('a-1')")
        make_emit(application)(an_event())
        1 / 0  # noqa: B018
    assert events(migrated) == []
    assert migrated.db.execute("SELECT FROM account").rowcount == 0
    with application.inside(application.transaction()):  # and the connection is as good as before
        make_emit(application)(an_event("second"))
    assert events(migrated) == ["second"]


def test_nested_transactions_and_savepoints_keep_what_they_keep(migrated: World, start: Start) -> None:
    application = start()
    emit = make_emit(application)
    with application.inside(application.transaction()):
        emit(an_event("outer"))
        with application.inside(application.nested()):
            emit(an_event("kept"))
        with pytest.raises(ZeroDivisionError), application.inside(application.nested()):
            emit(an_event("undone"))
            1 / 0  # noqa: B018
        emit(an_event("after"))
    assert events(migrated) == ["outer", "kept", "after"]


def test_many_keep_their_order(migrated: World, start: Start) -> None:
    application = start()
    some = [an_event(str(number), payload=None) for number in range(1000)]
    with application.inside(application.transaction()):
        assert make_emit_many(application)(iter(some)) == [event.id for event in some]
        assert make_emit_many(application)([]) == []
    assert events(migrated) == [event.event_type for event in some]


def test_many_are_written_all_or_none(migrated: World, start: Start) -> None:
    application = start()
    with application.inside(application.transaction()):
        with pytest.raises(EventRefused, match="aggregate_id is empty"):
            make_emit_many(application)([an_event("good"), Event("bad", "", {})])
        make_emit(application)(an_event("after"))  # nothing was written, and the transaction goes on
    assert events(migrated) == ["after"]


def test_without_a_transaction_it_is_refused(migrated: World, start: Start) -> None:
    application = start(autocommit=True)
    with pytest.raises(NoTransaction, match="no transaction is open"):
        make_emit(application)(an_event())
    with pytest.raises(NoTransaction):
        make_emit_many(application)([an_event()])
    assert events(migrated) == []


def test_two_databases_are_two_outboxes(migrated: World, start: Start, postgres: str, kafka: str) -> None:
    with make_world(postgres, kafka) as other:
        other.migrate()
        one, two = start(), start(other)
        with one.inside(one.transaction()), two.inside(two.transaction()):
            make_emit(one)(an_event("one"))
            make_emit(two)(an_event("two"))
        with pytest.raises(ZeroDivisionError), two.inside(two.transaction()):
            make_emit(two)(an_event("undone"))
            with one.inside(one.transaction()):
                make_emit(one)(an_event("kept"))
            1 / 0  # noqa: B018
        assert (events(migrated), events(other)) == (["one", "kept"], ["two"])
        two.close()


@pytest.mark.parametrize(
    ("payload_type", "payloads"),
    [
        (
            "json",
            [
                (' {"b" : 1.10,  "a": "\\u0000 %s :x ? $1"}', ' {"b" : 1.10,  "a": "\\u0000 %s :x ? $1"}'),
                (b'{"b":1.10}', '{"b":1.10}'),
                ("null", "null"),
                ([1, "zwei", None], '[1,"zwei",null]'),
                (5, "5"),
                (None, None),
            ],
        ),
        ("jsonb", [({"b": 1}, '{"b": 1}'), (None, None)]),
        ("text", [("no JSON\n\\x41", "no JSON\n\\x41"), (b"\xc3\xa9", "é"), ({"a": 1}, '{"a":1}'), ("", "")]),
        ("bytea", [(b"\x00\xff", "\\x00ff"), (b"", "\\x"), ("é", "\\xc3a9"), ({"a": 1}, "\\x7b2261223a317d")]),
    ],
)
def test_payloads_arrive_as_they_are(
    migrated: World, start: Start, payload_type: str, payloads: list[tuple[Any, str | None]]
) -> None:
    migrated.db.execute("ALTER TABLE outbox DROP COLUMN payload")
    migrated.db.execute(f"ALTER TABLE outbox ADD COLUMN payload {payload_type}")
    application = start()
    emit = make_emit(application, payload_type="json" if payload_type == "jsonb" else payload_type)
    for payload, stored in payloads:
        with application.inside(application.transaction()):
            event_id = emit(an_event(payload=payload))
        row = migrated.db.execute("SELECT payload::text FROM outbox WHERE id = %s", [event_id]).fetchone()
        assert row == (stored,)


def test_a_table_of_ones_own(migrated: World, start: Start) -> None:
    """With names that every driver would read as its own marks, and types that are no text."""
    table = '"Odd % :x ? $1 \\ {} ""'
    migrated.db.execute(
        f"""CREATE TABLE {table}" (key text, "aggregate" bigint, "type % :x" varchar(20), "data $1 ?" jsonb,
            at timestamptz DEFAULT now())""".encode()
    )
    columns = {
        "id": "key",
        "aggregate_type": None,
        "aggregate_id": "aggregate",
        "event_type": "type % :x",
        "payload": "data $1 ?",
        "headers": None,
    }
    application = start()
    emit = make_emit(application, table=f'public.{table}"', columns=columns)
    event = Event("opened", "42", {"a": 1})
    with application.inside(application.transaction()):
        emit(event)
        with pytest.raises(EventRefused, match="no column for them"):
            emit(Event("opened", "42", {"a": 1}, headers={"a": "b"}))
    row = migrated.db.execute(f'SELECT * FROM {table}"'.encode()).fetchone()
    assert row is not None
    assert row[:4] == (str(event.id), 42, "opened", {"a": 1})
    assert row[4] is not None


class TestPsycopg:
    """What only one driver has."""

    @pytest.fixture
    def connection(self, migrated: World) -> Iterator[psycopg.Connection[Any]]:
        with psycopg.connect(migrated.dsn, autocommit=True) as connection:
            yield connection

    def test_a_pipeline(self, migrated: World, connection: psycopg.Connection[Any]) -> None:
        from cdc_outbox.outbox.psycopg import Outbox

        with connection.transaction(), connection.pipeline():
            Outbox().emit(connection, an_event("one"))
            Outbox().emit(connection, an_event("two"))
        with connection.pipeline(), connection.transaction():
            Outbox().emit(connection, an_event("three"))
        assert events(migrated) == ["one", "two", "three"]

    def test_a_transaction_begun_by_hand(self, migrated: World, connection: psycopg.Connection[Any]) -> None:
        from cdc_outbox.outbox.psycopg import Outbox

        connection.execute("BEGIN")
        Outbox().emit(connection, an_event())
        assert events(migrated) == []
        connection.execute("COMMIT")
        assert events(migrated) == ["account.opened"]

    @pytest.mark.parametrize("factory", [psycopg.ClientCursor, psycopg.RawCursor])
    def test_other_cursors_and_rows(
        self, migrated: World, connection: psycopg.Connection[Any], factory: type[psycopg.Cursor[Any]]
    ) -> None:
        from cdc_outbox.outbox.psycopg import Outbox

        connection.cursor_factory = factory
        connection.row_factory = psycopg.rows.dict_row
        with connection.transaction():
            Outbox().emit(connection, an_event())
        assert events(migrated) == ["account.opened"]


def test_psycopg2_in_a_transaction_begun_by_hand(migrated: World) -> None:
    application = Psycopg2(migrated.dsn, autocommit=True)
    application.execute("BEGIN")
    make_emit(application)(an_event())
    application.execute("COMMIT")
    application.close()
    assert events(migrated) == ["account.opened"]


def test_asyncpg_with_a_json_codec_and_a_pool(migrated: World) -> None:
    """What many set: a codec that would encode JSON text once more."""
    import asyncio
    import json

    import asyncpg

    from cdc_outbox.outbox.asyncpg import AsyncOutbox
    from support.applications import url

    async def with_codec(connection: Any) -> None:
        for kind in ("json", "jsonb"):
            await connection.set_type_codec(kind, encoder=json.dumps, decoder=json.loads, schema="pg_catalog")

    async def emit() -> None:
        async with (
            asyncpg.create_pool(url(migrated.dsn, "postgresql"), init=with_codec, min_size=1) as pool,
            pool.acquire() as connection,
            connection.transaction(),
        ):
            await AsyncOutbox().emit(connection, an_event())

    asyncio.run(emit())
    assert migrated.db.execute("SELECT payload::text FROM outbox").fetchone() == ('{"amount":1.5,"who":"Zoë"}',)


def test_scoped_sessions(migrated: World) -> None:
    import sqlalchemy as sa
    from sqlalchemy.orm import scoped_session, sessionmaker

    from cdc_outbox.outbox.sqlalchemy import Outbox
    from support.applications import url

    engine = sa.create_engine(url(migrated.dsn, "postgresql+psycopg"))
    session = scoped_session(sessionmaker(engine))
    Outbox().emit(session, an_event())
    session.commit()
    session.remove()
    engine.dispose()
    assert events(migrated) == ["account.opened"]


def test_django_without_autocommit(migrated: World) -> None:
    """What Django calls so: no transaction but ours, and none that it begins by itself."""
    from support.applications import django_connections

    application = Django(migrated.dsn)
    connection = django_connections()[application.connection]
    connection.set_autocommit(False)
    make_emit(application)(an_event())
    connection.commit()
    connection.set_autocommit(True)
    application.close()
    assert events(migrated) == ["account.opened"]


def test_the_relay_carries_what_was_emitted(old_and_new_world: World, start_relay: Any) -> None:
    world = old_and_new_world
    world.migrate()
    kind = world.create_topic()
    start_relay()
    application = Psycopg(world.dsn)
    event = Event("account.opened", "a-1", {"a": 1}, aggregate_type=kind, headers={"tenant": "t"})
    with application.inside(application.transaction()):
        make_emit(application)(event)
    application.close()
    (record,) = world.read(kind, 1)
    assert (record.key(), record.value()) == (b"a-1", b'{"a":1}')
    assert dict(record.headers() or []) == {"id": str(event.id).encode(), "type": b"account.opened", "tenant": b"t"}
