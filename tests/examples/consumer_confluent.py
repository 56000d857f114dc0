"""A consumer with confluent-kafka and psycopg: ships each order once, whatever is delivered again or fails.

The loop does what is easy to get nearly right: transactions, offsets after them, rebalances, outages, poison.
"""

import json
import os

import psycopg
from confluent_kafka import Consumer

from cdc_outbox.inbox.confluent import consume
from cdc_outbox.inbox.psycopg import Inbox, Message


def ship(connection: psycopg.Connection, message: Message) -> None:
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
    consume(
        consumer,
        lambda: psycopg.connect(os.environ["DATABASE_URL"]),
        ship,
        inbox=Inbox("shipping"),
        topics=[os.environ["TOPIC"]],
        on_poison="park",
    )
    consumer.close()


if __name__ == "__main__":
    main()
