"""The demo's consumer, a process of its own: `python -m cdc_outbox.demo.consumer`. It acts on each event once.

The loop writes the effect, and the id of the message that it came from, in one transaction, and commits the offset
after that. Killed at any moment, it gets again what it has not said to have done, and the inbox tells what it did do.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import psycopg
from confluent_kafka import Consumer, TopicPartition

from cdc_outbox.demo.process import ChildProcess
from cdc_outbox.inbox.confluent import consume
from cdc_outbox.inbox.psycopg import Inbox, Message

EFFECT_TABLE: Final = """CREATE TABLE effect
    (place bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, aggregate_id text NOT NULL, event_id text NOT NULL)"""


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
    consume(consumer, lambda: psycopg.connect(os.environ["DEMO_DSN"]), act, inbox=Inbox("the demo's consumer"))
    consumer.close()


def act(connection: psycopg.Connection, message: Message) -> None:
    connection.execute("INSERT INTO effect (aggregate_id, event_id) VALUES (%s, %s)", [message.key, message.id])


if __name__ == "__main__":
    main()
