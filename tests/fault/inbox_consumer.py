"""A consumer with an inbox that dies where it is told to: `python -m fault.inbox_consumer <settings as JSON>`.

It counts the points around both of its commits, the database's and the offsets', and kills itself at one of them. With
a bug planted it does what people do who get it nearly right. It ends when it has read all there is.
"""

import json
import os
import random
import signal
import sys
from dataclasses import asdict, dataclass

import psycopg
from confluent_kafka import Consumer, KafkaError, TopicPartition

from cdc_outbox.inbox.psycopg import Inbox, Message

BUGS = ("inbox on a second connection", "offsets first")


@dataclass(frozen=True)
class Settings:
    dsn: str
    bootstrap_servers: str
    topic: str
    group: str
    #: the inbox's
    consumer: str
    #: at which point to die; 0: at none
    dies_at: int = 0
    bug: str = ""
    seed: int = 0

    def as_argument(self) -> str:
        return json.dumps(asdict(self))


class Life:
    def __init__(self, dies_at: int) -> None:
        self._left = dies_at

    def point(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    settings = Settings(**json.loads(sys.argv[1]))
    life, inbox, dice = Life(settings.dies_at), Inbox(settings.consumer), random.Random(settings.seed)
    consumer = Consumer(
        {
            "bootstrap.servers": settings.bootstrap_servers,
            "group.id": settings.group,
            "group.instance.id": "the-only-one",  # started again after a kill it goes on at once
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "fetch.wait.max.ms": 20,
        }
    )
    consumer.subscribe([settings.topic])
    with (
        psycopg.connect(settings.dsn, autocommit=True) as connection,
        psycopg.connect(settings.dsn, autocommit=True) as second,
    ):
        at_end: set[int | None] = set()
        while not at_end or len(at_end) < len(consumer.assignment()):
            records = consumer.consume(dice.randint(1, 20), 0.2)
            at_end |= {record.partition() for record in records if is_end(record.error())}
            messages = [Message.from_confluent(record) for record in records if record.error() is None]
            if not messages:
                continue
            offsets = next_offsets([record for record in records if record.error() is None])
            life.point()
            if settings.bug == "offsets first":
                consumer.commit(offsets=offsets, asynchronous=False)
                life.point()
            with connection.transaction():
                if settings.bug == "inbox on a second connection":
                    with second.transaction():
                        fresh = inbox.once_many(second, messages)
                elif dice.random() < 0.5:
                    fresh = inbox.once_many(connection, messages)
                else:
                    fresh = [message for message in messages if inbox.once(connection, message)]
                life.point()
                effects = [(settings.consumer, message.key, message.id) for message in fresh]
                connection.cursor().executemany(
                    "INSERT INTO effect (consumer, aggregate_id, event_id) VALUES (%s, %s, %s)", effects
                )
                life.point()
            life.point()
            consumer.commit(offsets=offsets, asynchronous=False)
            life.point()
    consumer.close()


def is_end(error: KafkaError | None) -> bool:
    if error is not None and error.code() != KafkaError._PARTITION_EOF:
        raise RuntimeError(str(error))
    return error is not None


def next_offsets(records: list) -> list[TopicPartition]:  # type: ignore[type-arg] # of librdkafka's messages
    return [TopicPartition(record.topic(), record.partition(), record.offset() + 1) for record in records]


if __name__ == "__main__":
    main()
