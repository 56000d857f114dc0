"""A consumer with confluent-kafka and psycopg: ships each order once, whatever is delivered again.

The offset is committed after the transaction: what was handled and not committed comes again, and the inbox knows it.
"""

import json
import os
import signal
from types import FrameType

import psycopg
from confluent_kafka import Consumer

from cdc_outbox.inbox.psycopg import Inbox, Message

inbox = Inbox("shipping")


def handle(connection: psycopg.Connection, message: Message) -> None:
    with connection.transaction():
        if inbox.once(connection, message):
            order = json.loads(message.value)
            connection.execute("INSERT INTO shipment (order_id) VALUES (%s)", [order["order"]])


def main() -> None:
    consumer = Consumer(
        {
            "bootstrap.servers": os.environ["KAFKA"],
            "group.id": os.environ.get("GROUP", "shipping"),
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    consumer.subscribe([os.environ["TOPIC"]])
    running = True

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal running
        running = False

    signal.signal(signal.SIGTERM, stop)
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        while running:
            record = consumer.poll(0.2)
            if record is not None and record.error() is None:
                handle(connection, Message.from_confluent(record))
                consumer.commit(message=record, asynchronous=False)
    consumer.close()


if __name__ == "__main__":
    main()
