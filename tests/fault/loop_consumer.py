"""`consume` in a process of its own, as people run it: `python -m fault.loop_consumer <settings as JSON>`.

It dies where it is told to: the points around the database's commits and the offsets' are counted. Its handler writes
one effect a message, and cannot take what the table `poison` names, in one way or another.
"""

import faulthandler
import json
import logging
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import psycopg
from confluent_kafka import Consumer, TopicPartition

from cdc_outbox.inbox.confluent import Message, consume
from cdc_outbox.inbox.psycopg import Inbox


@dataclass(frozen=True)
class Settings:
    dsn: str
    bootstrap_servers: str
    topic: str
    group: str
    #: of a static member, which goes on at once when it is started again; empty: a dynamic one
    member: str = ""
    #: at which point to die; 0: at none
    dies_at: int = 0
    on_poison: Literal["stop", "park"] = "park"
    batch: int = 20
    attempts: int = 5
    #: the handler's time for each message
    handler_seconds: float = 0.0
    max_poll_interval_ms: int = 30_000

    def as_argument(self) -> str:
        return json.dumps(asdict(self))


class Life:
    left = 0

    @classmethod
    def point(cls) -> None:
        cls.left -= 1
        if cls.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class MortalConnection(psycopg.Connection[Any]):
    def commit(self) -> None:
        Life.point()
        super().commit()
        Life.point()


class MortalConsumer(Consumer):
    def commit(self, *arguments: Any, **more: Any) -> list[TopicPartition]:  # type: ignore[override] # of its overloads
        Life.point()
        committed: Any = super().commit(*arguments, **more)
        Life.point()
        return committed  # type: ignore[no-any-return]


def main() -> None:
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    settings = Settings(**json.loads(sys.argv[1]))
    Life.left = settings.dies_at
    consumer = MortalConsumer(
        {
            "bootstrap.servers": settings.bootstrap_servers,
            "group.id": settings.group,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "fetch.wait.max.ms": 20,
            "session.timeout.ms": min(6_000, settings.max_poll_interval_ms),
            "max.poll.interval.ms": settings.max_poll_interval_ms,
            "reconnect.backoff.max.ms": 500,
            **({"group.instance.id": settings.member} if settings.member else {}),
        }
    )
    consume(
        consumer,
        lambda: MortalConnection.connect(settings.dsn, connect_timeout=2),
        lambda connection, message: handle(settings, connection, message),
        inbox=Inbox("billing"),
        topics=[settings.topic],
        batch=settings.batch,
        attempts=settings.attempts,
        on_poison=settings.on_poison,
    )
    logging.getLogger("loop").info("the loop of process %s has ended", os.getpid())
    consumer.close()


def handle(settings: Settings, connection: psycopg.Connection[Any], message: Message) -> None:
    if settings.handler_seconds:
        time.sleep(settings.handler_seconds)
    Life.point()
    failure = connection.execute("SELECT failure FROM poison WHERE key = %s", [message.key]).fetchone()
    if failure == ("dies",):
        os.kill(os.getpid(), signal.SIGKILL)
    connection.execute("INSERT INTO effect (aggregate_id, event_id) VALUES (%s, %s)", [message.key, message.id])
    if failure:
        raise ValueError(f"{message.key} is poison")
    Life.point()


if __name__ == "__main__":
    main()
