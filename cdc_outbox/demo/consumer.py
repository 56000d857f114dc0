"""The demo's consumer, a process of its own: `python -m cdc_outbox.demo.consumer`. It acts on each event once.

The effect, and the id of the message that it came from, are written in one transaction; the offset is committed after
that. Killed at any moment, it gets again what it has not said to have done, and the inbox tells it what it did do.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Final

import psycopg
from confluent_kafka import Consumer, TopicPartition

from cdc_outbox.demo.process import ChildProcess
from cdc_outbox.inbox.psycopg import Inbox, Message

EFFECT_TABLE: Final = """CREATE TABLE effect
    (place bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, aggregate_id text NOT NULL, event_id text NOT NULL)"""
_BATCH: Final = 100
_POLL_SECONDS: Final = 0.1


class ConsumerProcess(ChildProcess):
    program: Sequence[str] = (sys.executable, "-m", "cdc_outbox.demo.consumer")

    def __init__(self, *, dsn: str, bootstrap_servers: str, topic: str, group: str, log: Path) -> None:
        environment = {
            "DEMO_DSN": dsn,
            "DEMO_BOOTSTRAP_SERVERS": bootstrap_servers,
            "DEMO_TOPIC": topic,
            "DEMO_GROUP": group,
        }
        super().__init__(environment, log)


def main() -> None:
    consumer = Consumer(
        {
            "bootstrap.servers": os.environ["DEMO_BOOTSTRAP_SERVERS"],
            "group.id": os.environ["DEMO_GROUP"],
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "log_level": 0,
        }
    )
    # Not subscribed: it is the only one, and nobody has to notice first that it was killed.
    topic = os.environ["DEMO_TOPIC"]
    partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
    consumer.assign([TopicPartition(topic, number) for number in partitions])
    inbox = Inbox("the demo's consumer")
    stopping = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    with psycopg.connect(os.environ["DEMO_DSN"], autocommit=True) as connection:
        while not stopping:
            messages = [message for message in consumer.consume(_BATCH, _POLL_SECONDS) if message.error() is None]
            if messages:
                act_once(connection, inbox, [Message.from_confluent(message) for message in messages])
                consumer.commit(asynchronous=False)
    consumer.close()


def act_once(connection: psycopg.Connection, inbox: Inbox, messages: list[Message]) -> None:
    with connection.transaction(), connection.cursor() as cursor:
        fresh = inbox.once_many(connection, messages)
        effects = [(message.key, message.id) for message in fresh]
        cursor.executemany("INSERT INTO effect (aggregate_id, event_id) VALUES (%s, %s)", effects)


if __name__ == "__main__":
    main()
