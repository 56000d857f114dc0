"""What Kafka refuses, from outside: an event's own fault, ours, a passing one, or one that nobody has heard of.

Nothing is sent again and again while it stands.
"""

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import KafkaError
from confluent_kafka.admin import AdminClient

from acceptance.conftest import StartRelay
from cdc_outbox.demo.ports import free_port
from cdc_outbox.errors import PoisonEvent
from cdc_outbox.kafka.isolation import Isolation
from fault.mock_kafka import MockKafka, mock_kafka
from support import command
from support.observing import delivered_ids, readyz, readyz_state
from support.waiting import wait_until
from support.world import World, create_topic, read_topic

UNKNOWN = -1
FROM_THE_FUTURE = 999
NOT_LEADER = 6


def dead_letters(world: World) -> list[dict[str, Any]]:
    letters: list[dict[str, Any]] = json.loads(command.run(world.environment, "dead-letters", "list", "--json").out)
    return letters


@pytest.fixture
def lenient(world: World) -> World:
    world.settings["CDC_OUTBOX_RELAY__ON_POISON"] = "dead-letter"
    world.migrate()
    return world


def insert_late(world: World, aggregate_type: str) -> str:
    """An event that the topic takes for too old by the time the relay reads it."""
    create_topic(
        world.bootstrap_servers, f"outbox.{aggregate_type}", partitions=1, **{"message.timestamp.before.max.ms": "100"}
    )
    event_id = world.insert(aggregate_type)
    committed_at = time.monotonic()
    wait_until(lambda: time.monotonic() > committed_at + 0.3, "it is too old")
    return event_id


def test_a_commit_time_that_the_topic_refuses_stops_the_relay(world: World) -> None:
    world.migrate()
    event_id = insert_late(world, f"{world.name}_late")
    done = command.run(world.environment, "run")
    assert done.exit_code == 3
    assert f"event {event_id} of aggregate a-1 for topic outbox.{world.name}_late" in done.error
    assert "INVALID_TIMESTAMP" in done.error
    assert "message.timestamp.before.max.ms" in done.error


def test_a_commit_time_that_the_topic_refuses_is_a_dead_letter(lenient: World, start_relay: StartRelay) -> None:
    world = lenient
    aggregate_type = world.create_topic()
    others = [world.insert(aggregate_type, f"a-{number}") for number in range(200)]
    late = insert_late(world, f"{world.name}_late")
    others += [world.insert(aggregate_type, f"a-{number}") for number in range(200)]
    start_relay()
    world.wait_until_confirmed()
    (letter,) = dead_letters(world)
    assert (letter["event_id"], letter["reason"]) == (late, "INVALID_TIMESTAMP")
    delivered = delivered_ids(world, aggregate_type, len(others))
    assert set(delivered) == set(others)
    assert len(delivered) <= 2 * len(others), "what was in flight is sent a second time, not again and again"


def test_a_topic_created_again_with_fewer_partitions(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    topic = f"outbox.{aggregate_type}"
    relay = start_relay()
    for number in range(50):
        world.insert(aggregate_type, f"a-{number}")
    world.wait_until_confirmed()
    admin = AdminClient({"bootstrap.servers": world.bootstrap_servers})
    admin.delete_topics([topic])[topic].result()
    wait_until(lambda: topic not in admin.list_topics().topics, "it is gone")
    create_topic(world.bootstrap_servers, topic, partitions=1)
    event_ids = [world.insert(aggregate_type, f"a-{number}") for number in range(50)]
    world.wait_until_confirmed()
    assert not relay.ended
    assert set(delivered_ids(world, aggregate_type, 50)) == set(event_ids)


@pytest.fixture
def mock(lenient: World) -> Iterator[MockKafka]:
    """librdkafka's mock cluster in the place of the world's Kafka."""
    with mock_kafka(brokers=1) as made:
        made.create_topic("outbox.event", partitions=3, replicas=1)
        lenient.bootstrap_servers = made.bootstrap_servers
        yield made


@pytest.mark.parametrize("code", [UNKNOWN, FROM_THE_FUTURE])
@pytest.mark.parametrize("times", [1, 4])
def test_a_code_that_nobody_knows_is_tried_again(
    lenient: World, mock: MockKafka, start_relay: StartRelay, code: int, times: int
) -> None:
    world = lenient
    relay = start_relay()
    mock.fail_next_produces(*[code] * times)
    event_ids = [world.insert("event") for _ in range(5)]
    world.wait_until_confirmed()
    assert dead_letters(world) == []
    assert delivered_ids(world, "event", 5) == event_ids
    reason = "UNKNOWN" if code == UNKNOWN else f"ERR_{code}?"
    assert relay.metric(f'cdc_outbox_publish_failures_total{{reason="{reason}",topic="outbox.event"}}')
    assert not relay.ended


def test_a_code_that_nobody_knows_is_in_the_end_the_events_own_fault(
    lenient: World, mock: MockKafka, start_relay: StartRelay
) -> None:
    world = lenient
    relay = start_relay()
    mock.fail_next_produces(*[FROM_THE_FUTURE] * 100)
    bad = world.insert("event")
    (letter,) = wait_until(lambda: dead_letters(world), "it is a dead letter", timeout_seconds=30)
    mock.fail_no_more()
    good = world.insert("event")
    world.wait_until_confirmed()
    assert letter["event_id"] == bad
    assert delivered_ids(world, "event", 1) == [good]
    assert not relay.ended


def test_a_passing_refusal_is_waited_for_and_nothing_is_sent_twice(
    lenient: World, mock: MockKafka, start_relay: StartRelay
) -> None:
    world = lenient
    relay = start_relay()
    first = [world.insert("event", f"a-{number}") for number in range(20)]
    world.wait_until_confirmed()
    mock.fail_next_produces(FROM_THE_FUTURE, *[NOT_LEADER] * 10)
    second = [world.insert("event", f"a-{number}") for number in range(20)]
    world.wait_until_confirmed()
    delivered = delivered_ids(world, "event", 40)
    assert sorted(delivered) == sorted(first + second)
    assert readyz(relay)["status"] == 200


@pytest.mark.rest
def test_a_token_that_cannot_be_fetched_is_waited_for(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    producer = "CDC_OUTBOX_KAFKA__PRODUCER__"
    relay = start_relay(
        wait=False,
        **{
            f"{producer}SECURITY_PROTOCOL": "SASL_PLAINTEXT",
            f"{producer}SASL_MECHANISMS": "OAUTHBEARER",
            f"{producer}SASL_OAUTHBEARER_METHOD": "oidc",
            f"{producer}SASL_OAUTHBEARER_CLIENT_ID": "relay",
            f"{producer}SASL_OAUTHBEARER_CLIENT_SECRET": "secret",
            f"{producer}SASL_OAUTHBEARER_TOKEN_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}/token",
        },
    )
    wait_until(lambda: readyz_state(relay) == "waiting", "it waits")
    assert "OAUTHBEARER" in str(readyz(relay)["reason"])
    assert not relay.ended


@pytest.mark.rest
def test_events_of_topics_that_were_never_there_become_dead_letters(lenient: World, start_relay: StartRelay) -> None:
    world = lenient
    aggregate_type = world.create_topic()
    relay = start_relay()
    good, bad = [], []
    with world.db.transaction():
        for number in range(500):
            bad += [world.insert(f"{world.name}_junk"), world.insert(f"{world.name}_junk_{number}")]
            if number % 50 == 0:
                good.append(world.insert(aggregate_type))
    world.wait_until_confirmed(timeout_seconds=30)
    letters = dead_letters(world)
    assert sorted(letter["event_id"] for letter in letters) == sorted(bad)
    assert {letter["reason"] for letter in letters} == {"topic_missing"}
    assert delivered_ids(world, aggregate_type, len(good)) == good
    assert relay.metric('cdc_outbox_reconnects_total{side="postgres"}') == 0
    create_topic(world.bootstrap_servers, f"outbox.{world.name}_junk_0")
    (letter,) = [letter for letter in letters if letter["topic"] == f"outbox.{world.name}_junk_0"]
    wait_until(lambda: redriven(world, letter["id"]), "redriven once its topic is there", timeout_seconds=20)
    assert len(read_topic(world.bootstrap_servers, f"outbox.{world.name}_junk_0", 1)) == 1


def redriven(world: World, dead_letter_id: int) -> bool:
    command.run(world.environment, "dead-letters", "redrive", str(dead_letter_id))
    world.wait_until_confirmed()
    letter = json.loads(command.run(world.environment, "dead-letters", "show", str(dead_letter_id), "--json").out)
    return bool(letter["state"] == "redriven")


def test_a_topic_that_collides_with_another_is_the_events_own_fault(lenient: World, start_relay: StartRelay) -> None:
    world = lenient
    aggregate_type = world.create_topic("x_y")
    start_relay(CDC_OUTBOX_KAFKA__CREATE_TOPICS="true")
    bad, good = world.insert(aggregate_type.replace("_x_y", "_x.y")), world.insert(aggregate_type)
    world.wait_until_confirmed()
    (letter,) = dead_letters(world)
    assert (letter["event_id"], letter["reason"]) == (bad, "TOPIC_EXCEPTION")
    assert delivered_ids(world, aggregate_type, 1) == [good]


@pytest.mark.rest
def test_a_topic_that_goes_while_the_relay_runs_ends_it(lenient: World, start_relay: StartRelay) -> None:
    """It is no event's fault: nothing becomes a dead letter."""
    world = lenient
    aggregate_type = world.create_topic()
    topic = f"outbox.{aggregate_type}"
    relay = start_relay()
    world.insert(aggregate_type)
    world.wait_until_confirmed()
    admin = AdminClient({"bootstrap.servers": world.bootstrap_servers})
    admin.delete_topics([topic])[topic].result()
    world.insert(aggregate_type)
    assert relay.process.wait(40) == 3
    assert f"topic {topic} does not exist" in relay.said()
    assert dead_letters(world) == []


@pytest.mark.parametrize("last", ["a topic that is missing", "an event that is refused"])
def test_a_refusal_and_a_missing_topic_in_one_transaction(lenient: World, start_relay: StartRelay, last: str) -> None:
    """The report of the one comes while the other is dealt with."""
    world = lenient
    aggregate_type, small = world.create_topic(), f"{world.name}_small"
    create_topic(world.bootstrap_servers, f"outbox.{small}", partitions=1, **{"max.message.bytes": "1000"})
    with world.db.transaction():
        good = [world.insert(aggregate_type) for _ in range(50)]
        bad = [world.insert(small, payload=json.dumps({"x": os.urandom(2000).hex()}))]
        bad.append(world.insert(f"{world.name}_missing"))
        if last == "an event that is refused":
            bad.append(world.insert(small, payload=json.dumps({"x": os.urandom(2000).hex()})))
    relay = start_relay()
    world.wait_until_confirmed()
    assert [letter["event_id"] for letter in dead_letters(world)] == bad
    delivered = delivered_ids(world, aggregate_type, len(good))
    assert set(delivered) == set(good)
    assert len(delivered) <= 3 * len(good)
    reconnects = relay.metric('cdc_outbox_reconnects_total{side="kafka"}')
    assert reconnects is not None
    assert reconnects <= 3


def test_unexpected_answers_are_counted_whatever_comes_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cdc_outbox.kafka.isolation._FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr("cdc_outbox.kafka.isolation._LONGEST_PAUSE_SECONDS", 0.01)
    sent: list[int] = []
    answers = [KafkaError._TRANSPORT] * 7 + [FROM_THE_FUTURE] * 3 + [KafkaError._TRANSPORT] + [FROM_THE_FUTURE] * 10

    def produce(*event: Any) -> None:
        sent.append(answers[len(sent)])
        event[4](KafkaError(sent[-1]), None)

    isolation = Isolation(produce, lambda _topic, _reason: None)
    isolation.publish("outbox.event", b"", b"", -1, lambda *_: pytest.fail("nobody took it"), None, 0, [])
    wait_until(isolation.is_settled, "it is given up")
    assert isinstance(isolation.refusal, PoisonEvent)
    assert sent.count(FROM_THE_FUTURE) == 5
