"""Refusals, from outside: what is wrong is said in one line, with its exit code, and nothing is lost."""

import json
import uuid

import pytest
from psycopg import conninfo

from acceptance.conftest import StartRelay
from support import command
from support.observing import delivered_ids
from support.world import World, create_topic, read_topic

SECRET = "hunter2-secret"


def bad(world: World) -> dict[str, tuple[dict[str, str], int, str]]:
    """What is wrong: settings, exit code, what the error names."""
    wrong_password = conninfo.make_conninfo(world.dsn, password=SECRET)
    return {
        "no dsn": ({"CDC_OUTBOX_POSTGRES__DSN": f"nonsense {SECRET}"}, 2, "postgres.dsn"),
        "password": ({"CDC_OUTBOX_POSTGRES__DSN": wrong_password}, 3, "password authentication failed for user"),
        "database": ({"CDC_OUTBOX_POSTGRES__DSN": conninfo.make_conninfo(world.dsn, dbname="nope")}, 3, '"nope"'),
        "port": ({"CDC_OUTBOX_POSTGRES__DSN": f"host=127.0.0.1 port=x password={SECRET}"}, 2, "postgres.dsn: invalid"),
        "sslmode": ({"CDC_OUTBOX_POSTGRES__DSN": f"sslmode=x password={SECRET}"}, 2, 'invalid sslmode value: "x"'),
        "service": ({"CDC_OUTBOX_POSTGRES__DSN": "service=nope"}, 2, 'definition of service "nope" not found'),
        "slot": ({"CDC_OUTBOX_POSTGRES__SLOT": "nope"}, 3, "slot 'nope' does not exist -- if database"),
        "slot name": ({"CDC_OUTBOX_POSTGRES__SLOT": "No-Slot"}, 2, "postgres.slot = 'No-Slot'"),
        "publication": ({"CDC_OUTBOX_POSTGRES__PUBLICATION": "nope"}, 3, "publication 'nope' does not exist"),
        "table": ({"CDC_OUTBOX_OUTBOX__TABLE": "app.nope"}, 3, "table app.nope does not exist"),
        "column": ({"CDC_OUTBOX_OUTBOX__COLUMNS__PAYLOAD": "nope"}, 3, "no column 'nope', wanted for payload"),
        "topic": ({"CDC_OUTBOX_KAFKA__TOPIC": "nope"}, 3, "topic nope does not exist"),
        "template": ({"CDC_OUTBOX_KAFKA__TOPIC": "a{"}, 2, "kafka.topic = 'a{'"),
        "blanks": ({"CDC_OUTBOX_KAFKA__TOPIC": "no blanks allowed"}, 2, "kafka.topic = 'no blanks allowed' makes no"),
        "dots": ({"CDC_OUTBOX_KAFKA__TOPIC": ".."}, 2, "kafka.topic = '..' makes no topic"),
        "umlaut": ({"CDC_OUTBOX_KAFKA__TOPIC": "straße.{aggregate_type}"}, 2, "makes no topic"),
        "long": ({"CDC_OUTBOX_KAFKA__TOPIC": "x" * 249 + "{aggregate_type}"}, 2, "at most 249"),
        "promise": ({"CDC_OUTBOX_KAFKA__PRODUCER__ACKS": "1"}, 2, "kafka.producer.acks cannot be set"),
        "key": ({"CDC_OUTBOX_KAFKA__NOPE": "1"}, 2, "unknown key kafka.nope"),
        "value": ({"CDC_OUTBOX_KAFKA__HEADERS": "nope"}, 2, "kafka.headers = 'nope'"),
        "no broker": ({"CDC_OUTBOX_KAFKA__BOOTSTRAP_SERVERS": ""}, 2, "kafka.bootstrap_servers is required"),
        "listen": ({"CDC_OUTBOX_HTTP__LISTEN": "192.0.2.1:80"}, 2, "http.listen = 192.0.2.1:80"),
    }


def test_what_is_wrong_is_said_in_one_line_with_its_exit_code(world: World) -> None:
    world.migrate()
    for name, (settings, exit_code, named) in bad(world).items():
        done = command.run({**world.environment, **settings}, "run")
        assert done.exit_code == exit_code, (name, done)
        assert named in done.error, name
        assert " -- " in done.error or exit_code == 2, f"{name}: how to fix it"
        everything = done.out + done.err
        assert "Traceback" not in everything
        assert SECRET not in everything


def test_a_topic_missing_for_a_row_stops_before_it_and_loses_nothing(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    good = world.insert(aggregate_type)
    missing = f"{world.name}_missing"
    world.insert(missing)
    done = command.run(world.environment, "run")
    assert done.exit_code == 3
    assert f"topic outbox.{missing} does not exist" in done.error
    assert "kafka.create_topics" in done.error
    # fixed, it goes on where it stopped
    start_relay(CDC_OUTBOX_KAFKA__CREATE_TOPICS="true")
    world.wait_until_confirmed()
    assert good in delivered_ids(world, aggregate_type, 1)
    assert len(read_topic(world.bootstrap_servers, f"outbox.{missing}", 1)) == 1


def test_poison_stops_the_relay_before_anything_passes_it(world: World) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    good = world.insert(aggregate_type)
    before = world.current_lsn()
    world.insert("no topic", payload='{"secret": "payload"}')
    world.insert(aggregate_type)
    for _ in range(2):
        done = command.run(world.environment, "run")
        assert done.exit_code == 3
        assert "topic 'outbox.no topic' is no name that Kafka takes" in done.error
        assert "(Insert 1 of the transaction that commits at " in done.error
        assert "secret" not in done.err
        assert world.confirmed_lsn() == before, "what came before is confirmed, and sent once"
    assert delivered_ids(world, aggregate_type, 1) == [good]


@pytest.mark.parametrize("linger_ms", ["5", "0"], ids=["in one batch", "in batches of their own"])
def test_an_event_too_large_for_the_topic_stops_the_relay_and_nothing_passes_it(world: World, linger_ms: str) -> None:
    world.settings["CDC_OUTBOX_KAFKA__PRODUCER__LINGER__MS"] = linger_ms
    world.migrate()
    topic = f"outbox.{world.name}_small"
    create_topic(world.bootstrap_servers, topic, partitions=1, **{"max.message.bytes": "3000"})
    incompressible = json.dumps({"x": "".join(str(uuid.uuid4()) for _ in range(300))})
    with world.db.transaction():
        other = world.insert(f"{world.name}_small")
        poison = world.insert(f"{world.name}_small", payload=incompressible)
        world.insert(f"{world.name}_small")
    done = command.run(world.environment, "run")
    assert done.exit_code == 3
    assert f"for topic {topic} can never be published: topic {topic} refuses it: MSG_SIZE_TOO_LARGE" in done.error
    assert f"event {poison} of aggregate a-1 " in done.error
    assert "(Insert 2 of the transaction that commits at " in done.error
    assert "max.message.bytes" in done.error
    assert set(delivered_ids(world, f"{world.name}_small", 1)) == {other}


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [("MESSAGE_MAX_BYTES", "2000", "MSG_SIZE_TOO_LARGE"), ("QUEUE_BUFFERING_MAX_KBYTES", "2", "max.kbytes")],
)
def test_an_event_too_large_for_the_client_stops_the_relay(world: World, key: str, value: str, named: str) -> None:
    world.migrate()
    world.insert(world.create_topic(), payload=json.dumps({"x": "x" * 4000}))
    done = command.run({**world.environment, f"CDC_OUTBOX_KAFKA__PRODUCER__{key}": value}, "run")
    assert done.exit_code == 3
    assert named in done.error
