"""Kafka killed, frozen, out of reach, short of replicas, forgetful and forbidding while events flow."""

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._acl import AclBinding, AclBindingFilter, AclOperation, AclPermissionType
from confluent_kafka.admin._resource import ResourcePatternType, ResourceType

from fault.broker_settings import MECHANISM, PASSWORD, USER
from fault.mock_kafka import (
    NOT_ENOUGH_REPLICAS,
    NOT_ENOUGH_REPLICAS_AFTER_APPEND,
    NOT_LEADER,
    REQUEST_TIMED_OUT,
    MockKafka,
    mock_kafka,
)
from fault.reader import read_to_the_end
from fault.stage import Stage, peak_rss_mb
from support import command
from support.waiting import wait_until
from support.world import create_topic


def test_broker_killed_and_started(stage: Stage) -> None:
    stage.start_relay()
    stage.start_writer(seed=40)
    for _ in range(2):
        stage.wait_for_events(400)
        with stage.incident():
            stage.servers.kafka.kill()
            stage.wait_for_events(200)
            stage.servers.kafka.start()
    stage.close("broker killed, started", max_duplicates=0)


def test_broker_frozen(stage: Stage) -> None:
    stage.start_relay()
    stage.start_writer(seed=41)
    stage.wait_for_events(300)
    with stage.incident():
        os.kill(stage.servers.kafka.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: not stage.observer.is_ready, "it is noticed", timeout_seconds=12)
            stage.wait_for_events(1500)
        finally:
            os.kill(stage.servers.kafka.pid, signal.SIGCONT)
    stage.close("broker frozen", max_duplicates=0, detects_within_seconds=10)


def test_broker_out_of_reach_for_a_minute(stage: Stage) -> None:
    """Under a load that would fill memory in seconds, if it were kept there."""
    relay = stage.start_relay()
    stage.start_writer(seed=42, events_per_second=5000, connections=2)
    stage.wait_for_events(1000)
    with stage.incident():
        stage.servers.kafka_proxy.refuse()
        time.sleep(60)  # it is the time that is tried
        stage.servers.kafka_proxy.restore()
    assert peak_rss_mb(relay.process.pid) < 130
    stage.close("broker out of reach for a minute, full load", max_duplicates=0, detects_within_seconds=10)


def test_acknowledgements_lost(stage: Stage) -> None:
    """Kafka has appended and nobody hears of it; the retry is the same batch, and no duplicate."""
    stage.start_relay()
    stage.start_writer(seed=44)
    for _ in range(4):
        stage.wait_for_events(300)
        with stage.incident():
            stage.servers.kafka_proxy.swallow_answers()
            stage.wait_for_events(300)
            stage.servers.kafka_proxy.restore()
    stage.close("acknowledgements lost", max_duplicates=0)


@pytest.fixture
def mock(stage: Stage) -> Iterator[MockKafka]:
    """Three brokers of librdkafka's mock, with the stage's topics, in place of its Kafka."""
    topics = [f"outbox.{aggregate_type}" for aggregate_type in stage.aggregate_types]
    with mock_kafka(3) as made:
        for topic in topics:
            made.create_topic(topic, partitions=3, replicas=3)
        stage.start_relay(
            CDC_OUTBOX_KAFKA__BOOTSTRAP_SERVERS=made.bootstrap_servers, CDC_OUTBOX_KAFKA__PRODUCER__MAX_IN_FLIGHT="1"
        )
        stage.reads_from = made.bootstrap_servers
        yield made
        stage.clean_up()


def test_leaders_that_move_and_brokers_that_refuse(stage: Stage, mock: MockKafka) -> None:
    """Every error that is worth a retry, while partitions change their leaders and brokers go and come."""
    stage.start_writer(seed=45)
    for round_ in range(6):
        stage.wait_for_events(200)
        with stage.incident():
            for aggregate_type in stage.aggregate_types:
                for partition in range(3):
                    mock.move_leader(f"outbox.{aggregate_type}", partition, (partition + round_) % 3 + 1)
            mock.fail_next_produces(
                NOT_LEADER, NOT_ENOUGH_REPLICAS, REQUEST_TIMED_OUT, NOT_ENOUGH_REPLICAS_AFTER_APPEND
            )
            if round_ % 2:
                mock.take_down(round_ % 3 + 1)
                stage.wait_for_events(200)
                mock.bring_up(round_ % 3 + 1)
    stage.close("leaders moved, brokers down, retriable errors (mock)")


def test_not_enough_replicas(stage: Stage, mock: MockKafka) -> None:
    """A single real broker never lacks any: it asks for no more than the topic has."""
    stage.start_writer(seed=43)
    stage.wait_for_events(300)
    with stage.incident():
        mock.fail_next_produces(*[NOT_ENOUGH_REPLICAS] * 10_000)
        wait_until(lambda: not stage.observer.is_ready, "it is noticed", timeout_seconds=12)
        mock.fail_no_more()
    stage.close("not enough replicas (mock)", detects_within_seconds=10)


def test_topic_deleted_while_running(stage: Stage) -> None:
    relay = stage.start_relay()
    topic = f"outbox.{stage.world.name}_doomed"
    create_topic(stage.world.bootstrap_servers, topic, partitions=1)
    stage.world.insert(f"{stage.world.name}_doomed")
    stage.world.wait_until_confirmed()
    admin = AdminClient({"bootstrap.servers": stage.world.bootstrap_servers})
    admin.delete_topics([topic])[topic].result()
    event_id = stage.world.insert(f"{stage.world.name}_doomed")
    began = time.monotonic()
    wait_until(lambda: relay.ended or not stage.observer.is_ready, "it is noticed", timeout_seconds=10)
    stage.refused("topic deleted while running", time.monotonic() - began)
    stage.ends_with(relay, f"topic {topic} does not exist", "kafka.create_topics", within_seconds=60)
    create_topic(stage.world.bootstrap_servers, topic, partitions=1)
    stage.start_relay()
    stage.world.wait_until_confirmed()
    assert event_id in {record.event_id for record in read_to_the_end(stage.world.bootstrap_servers, [topic])}


def sasl(stage: Stage, **more: str) -> dict[str, Any]:
    return {
        "CDC_OUTBOX_KAFKA__BOOTSTRAP_SERVERS": f"127.0.0.1:{stage.servers.broker_ports.sasl}",
        "CDC_OUTBOX_KAFKA__PRODUCER__SECURITY_PROTOCOL": "SASL_SSL",
        "CDC_OUTBOX_KAFKA__PRODUCER__SSL_CA_LOCATION": str(stage.servers.broker_ca),
        "CDC_OUTBOX_KAFKA__PRODUCER__SASL_MECHANISMS": MECHANISM,
        "CDC_OUTBOX_KAFKA__PRODUCER__SASL_USERNAME": USER,
        "CDC_OUTBOX_KAFKA__PRODUCER__SASL_PASSWORD": PASSWORD,
        **more,
    }


def test_right_to_write_taken_away(stage: Stage) -> None:
    admin = AdminClient({"bootstrap.servers": stage.world.bootstrap_servers})
    right = (ResourceType.TOPIC, f"outbox.{stage.world.name}", ResourcePatternType.PREFIXED, f"User:{USER}", "*")
    allowed = AclBinding(*right, AclOperation.ALL, AclPermissionType.ALLOW)
    admin.create_acls([allowed])[allowed].result()
    relay = stage.start_relay(**sasl(stage))
    stage.start_writer(seed=46)
    stage.wait_for_events(300)
    rights = AclBindingFilter(*right, AclOperation.ANY, AclPermissionType.ANY)
    with stage.incident():
        admin.delete_acls([rights])[rights].result()
        began = time.monotonic()
        wait_until(lambda: relay.ended or not stage.observer.is_ready, "it is noticed", timeout_seconds=10)
        stage.refused("right to write taken away", time.monotonic() - began)
        stage.ends_with(relay, "must not be written to", "grant WRITE on the topic", within_seconds=30)
        admin.create_acls([allowed])[allowed].result()
        stage.start_relay(**sasl(stage))
    stage.close("right to write taken away, given back")


def test_the_doctor_names_the_right_that_is_missing(stage: Stage) -> None:
    admin = AdminClient({"bootstrap.servers": stage.world.bootstrap_servers})
    topics = (ResourceType.TOPIC, f"outbox.{stage.world.name}", ResourcePatternType.PREFIXED, f"User:{USER}", "*")
    for operation in (AclOperation.DESCRIBE, AclOperation.DESCRIBE_CONFIGS):
        allowed = AclBinding(*topics, operation, AclPermissionType.ALLOW)
        admin.create_acls([allowed])[allowed].result()

    def rights() -> dict[str, Any] | None:
        done = command.run(stage.environment(**sasl(stage)), "doctor", "--json")
        assert "Traceback" not in done.err
        findings = json.loads(done.out)["findings"]
        return next((finding for finding in findings if finding["check"] == "rights to write"), None)

    seen = wait_until(rights, "the broker has taken in what may be described")
    assert seen
    assert seen["state"] == "failed"
    assert f"outbox.{stage.world.name}" in seen["found"]
    assert "--operation Write" in seen["hint"]


def test_wrong_password(stage: Stage) -> None:
    wrong = "hunter3-sasl"
    relay = stage.start_relay(wait=False, **sasl(stage, CDC_OUTBOX_KAFKA__PRODUCER__SASL_PASSWORD=wrong))
    stage.refused("wrong SASL password", stage.ends_with(relay, "refuses us", "check kafka.producer's"))
    assert wrong not in (stage.folder / "relay.log").read_text()


@pytest.mark.parametrize("authority", ["the right one", "another"])
def test_tls(stage: Stage, authority: str) -> None:
    ca = stage.servers.broker_ca
    if authority == "another":
        import trustme

        ca = stage.folder / "another.pem"
        trustme.CA().cert_pem.write_to_path(str(ca))
    settings: dict[str, Any] = {
        "CDC_OUTBOX_KAFKA__BOOTSTRAP_SERVERS": f"127.0.0.1:{stage.servers.broker_ports.tls}",
        "CDC_OUTBOX_KAFKA__PRODUCER__SECURITY_PROTOCOL": "SSL",
        "CDC_OUTBOX_KAFKA__PRODUCER__SSL_CA_LOCATION": str(ca),
    }
    relay = stage.start_relay(wait=authority != "another", **settings)
    if authority == "another":
        stage.refused("broker's certificate of another CA", stage.ends_with(relay, "refuses us", "ssl.*"))
        return
    event_id = stage.world.insert(stage.aggregate_types[0])
    stage.world.wait_until_confirmed()
    assert [record.event_id for record in stage.records()] == [event_id]
