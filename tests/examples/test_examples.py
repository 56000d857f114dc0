"""The examples, run as they stand: applications whose order becomes a record, consumers that ship each order once."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from confluent_kafka import Producer
from psycopg import conninfo

from cdc_outbox.inbox import schema as inbox_schema
from support import command
from support.applications import url
from support.relays import CheckedRelay
from support.waiting import wait_until
from support.world import World, create_topic, headers_of, read_topic

TESTS = Path(__file__).parents[1]
ORDERS = 20


@pytest.fixture
def shop(world: World, tmp_path: Path) -> Iterator[World]:
    """A database with orders and shipments, and a relay."""
    world.migrate()
    world.db.execute("CREATE TABLE orders (id serial PRIMARY KEY, customer text NOT NULL, total int NOT NULL)")
    world.db.execute("CREATE TABLE shipment (id serial PRIMARY KEY, order_id int NOT NULL)")
    world.db.execute(inbox_schema.sql().encode())
    create_topic(world.bootstrap_servers, topic(world))
    settings = {"CDC_OUTBOX_HTTP__LISTEN": "127.0.0.1:0", "CDC_OUTBOX_KAFKA__TOPIC": f"{world.name}.{{aggregate_type}}"}
    with CheckedRelay({**world.environment, **settings}, tmp_path / "relay.log"):
        yield world


def topic(world: World) -> str:
    return f"{world.name}.order"


def environment(world: World) -> dict[str, str]:
    parts = {name: str(value) for name, value in conninfo.conninfo_to_dict(world.dsn).items()}
    return {
        **os.environ,
        "DATABASE_URL": url(world.dsn, "postgresql"),
        "SQLALCHEMY_URL": url(world.dsn, "postgresql+asyncpg"),
        "PGHOST": parts["host"],
        "PGPORT": parts["port"],
        "PGUSER": parts["user"],
        "PGPASSWORD": parts.get("password", ""),
        "PGDATABASE": parts["dbname"],
        "KAFKA": world.bootstrap_servers,
        "TOPIC": topic(world),
        "GROUP": world.name,
    }


def run(world: World, *command: str, **more: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=TESTS,
        env={**environment(world), **more},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


POST = """
from fastapi.testclient import TestClient
from examples.fastapi_sqlalchemy import app
with TestClient(app) as client:
    assert client.post("/orders", json={"customer": "Ada"}).status_code == 422
    print(client.post("/orders", json={"customer": "Ada", "total": 620}).raise_for_status().json()["order"])
"""


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "examples.plain_psycopg"),
        ("-m", "examples.plain_asyncpg"),
        ("-c", POST),
        ("-m", "examples.django_orders"),
    ],
    ids=["psycopg", "asyncpg", "FastAPI and SQLAlchemy", "Django"],
)
def test_an_application_says_what_it_did(shop: World, command: tuple[str, ...]) -> None:
    assert run(shop, *command).strip() == "1"
    (record,) = read_topic(shop.bootstrap_servers, topic(shop), 1)
    assert record.key() == b"1"
    assert record.value() == b'{"order":1,"customer":"Ada","total":620}'
    assert dict(record.headers() or [])["type"] == b"order.placed"
    assert shop.db.execute("SELECT customer, total FROM orders").fetchall() == [("Ada", 620)]


def consuming(world: World, module: str, log: Path, **more: str) -> AbstractContextManager[None]:
    return running(world, ("-m", f"examples.{module}"), log, **more)


@contextmanager
def running(world: World, command: tuple[str, ...], log: Path, **more: str) -> Iterator[None]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=TESTS,
            env={**environment(world), **more},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield
            assert process.poll() is None, log.read_text()
        finally:
            process.terminate()
            assert process.wait(20) == 0, log.read_text()


@pytest.mark.parametrize("module", ["consumer_confluent", "consumer_aiokafka", "consumer_faststream"])
@pytest.mark.rest
def test_a_consumer_ships_each_order_once(shop: World, module: str, tmp_path: Path) -> None:
    run(shop, "-c", PLACE)
    records = read_topic(shop.bootstrap_servers, topic(shop), ORDERS)
    with consuming(shop, module, tmp_path / "consumer.log"):
        wait_until(lambda: shipped(shop) == ORDERS, "all are shipped")
    producer = Producer({"bootstrap.servers": shop.bootstrap_servers})
    for record in records:  # as a relay that crashed sends them again
        producer.produce(
            topic(shop),
            record.value(),
            record.key(),
            record.partition() or 0,
            timestamp=record.timestamp()[1],
            headers=record.headers(),
        )
    producer.flush()
    run(shop, "-c", PLACE)
    with consuming(shop, module, tmp_path / "consumer.log"):
        wait_until(lambda: shipped(shop) == 2 * ORDERS, "all are shipped")
    each_once = shop.db.execute("SELECT order_id FROM shipment ORDER BY order_id").fetchall()
    assert each_once == [(number,) for number in range(1, 2 * ORDERS + 1)]


@pytest.mark.rest
def test_with_celery(shop: World, tmp_path: Path) -> None:
    """An event twice in the topic, and a task twice in the queue: one shipment."""
    (tmp_path / "queue").mkdir()
    folders = dict.fromkeys(("data_folder_in", "data_folder_out", "control_folder"), str(tmp_path / "queue"))
    more = {"CELERY_BROKER_URL": "filesystem://", "CELERY_BROKER_OPTIONS": json.dumps(folders)}
    worker = ("celery", "-A", "examples.celery_orders", "worker", "--pool", "solo", "--loglevel", "INFO")
    run(shop, "-c", PLACE)
    (record, *_) = read_topic(shop.bootstrap_servers, topic(shop), ORDERS)
    again = Producer({"bootstrap.servers": shop.bootstrap_servers})
    again.produce(topic(shop), record.value(), record.key(), headers=record.headers(), timestamp=record.timestamp()[1])
    again.flush()
    at = datetime.fromtimestamp(record.timestamp()[1] / 1000, UTC).isoformat()
    arguments = (dict(headers_of(record))["id"], at, (record.value() or b"").decode())
    twice = f"from examples.celery_orders import ship; ship.delay(*{arguments!r})"
    with (
        consuming(shop, "celery_orders", tmp_path / "consumer.log", **more),
        running(shop, ("-m", *worker), tmp_path / "worker.log", **more),
    ):
        wait_until(lambda: shipped(shop) == ORDERS, "all are shipped", timeout_seconds=30)
        run(shop, "-c", twice, **more)
        tasks = "SELECT FROM inbox WHERE consumer = 'shipping queue'"
        assert shop.db.execute(tasks).rowcount == ORDERS
        done = "succeeded in"
        wait_until(lambda: (tmp_path / "worker.log").read_text().count(done) == ORDERS + 1, "all tasks are done")
    assert shop.db.execute("SELECT order_id FROM shipment ORDER BY 1").fetchall() == [
        (number,) for number in range(1, ORDERS + 1)
    ]


@pytest.mark.rest
def test_with_faststream_and_parking(shop: World, tmp_path: Path) -> None:
    """An order that cannot be shipped waits, one of the same key behind it; the others do not."""
    shop.db.execute("CREATE TABLE address (customer text PRIMARY KEY, address text NOT NULL)")
    shop.db.execute("INSERT INTO address VALUES ('Ada', 'Somerville')")
    producer = Producer({"bootstrap.servers": shop.bootstrap_servers})
    for number, (key, customer) in enumerate([("k", "Ada"), ("b", "Bob"), ("b", "Ada"), ("l", "Ada")]):
        order = json.dumps({"order": number, "customer": customer}).encode()
        producer.produce(topic(shop), order, key, 0, headers={"id": f"e-{number}"})
    producer.flush()
    with consuming(shop, "faststream_parking", tmp_path / "consumer.log"):
        wait_until(lambda: shipped(shop) == 2, "the others are shipped", timeout_seconds=30)
        states = "SELECT message_id, state FROM inbox_parked ORDER BY place"
        expected = [("e-1", "parked"), ("e-2", "behind")]
        wait_until(lambda: shop.db.execute(states).fetchall() == expected, "it is parked", timeout_seconds=30)
        shop.db.execute("INSERT INTO address VALUES ('Bob', 'Elsewhere')")
        done = command.run(shop.environment, "inbox", "unpark", "e-1")
        assert (done.exit_code, done.out) == (0, "message 'e-1' handled; 1 behind it\n")
        wait_until(lambda: shipped(shop) == 4, "all are shipped", timeout_seconds=30)
    assert shop.db.execute("SELECT order_id FROM shipment ORDER BY id").fetchall() == [(0,), (3,), (1,), (2,)]


def snippets(heading: str) -> str:
    """The Python under a heading of the README."""
    section = (TESTS.parent / "README.md").read_text().partition(f"### {heading}\n")[2].partition("\n### ")[0]
    return section.partition("```python\n")[2].partition("```")[0]


def test_what_the_readme_says_can_be_pasted(shop: World, tmp_path: Path) -> None:
    shop.db.execute("DROP TABLE orders, shipment")
    settings = {
        "CDC_OUTBOX_POSTGRES__DSN": shop.dsn,
        "CDC_OUTBOX_KAFKA__BOOTSTRAP_SERVERS": shop.bootstrap_servers,
        "CDC_OUTBOX_KAFKA__TOPIC": f"{shop.name}.{{aggregate_type}}",
        "TOPIC": topic(shop),
    }
    # a group of its own: this one is ended without a word, and the others' would wait for it
    code = snippets("In your consumer").replace('"group.id": "shipping"', f'"group.id": "{shop.name}"')
    consumer = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **settings})
    try:
        for _ in range(3):
            subprocess.run(
                [sys.executable, "-c", snippets("In your application")], env={**os.environ, **settings}, check=True
            )
        wait_until(lambda: shipped(shop) == 3, "all are shipped")
    finally:
        consumer.terminate()
        consumer.wait(20)
    assert shop.db.execute("SELECT order_id FROM shipment ORDER BY 1").fetchall() == [(1,), (2,), (3,)]


PLACE = f"""
import os, psycopg
from examples.plain_psycopg import place_order
with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
    for number in range({ORDERS}):
        place_order(connection, "Ada", number)
"""


def shipped(world: World) -> int:
    if world.db.execute("SELECT to_regclass('shipment')").fetchone() == (None,):
        return 0
    return world.db.execute("SELECT FROM shipment").rowcount
