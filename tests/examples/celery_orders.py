"""Celery: the consumer puts each event into its queue, and the task ships the order once.

`python -m examples.celery_orders` is the consumer, `celery -A examples.celery_orders worker` works. In the place of
`task.delay_on_commit()`, which loses the task when the process ends, or the queue is away, after the commit.

Two steps, so two inboxes. An event may be put into the queue twice, if the consumer ends before its commit, and a task
may run twice, if its worker ends (acks_late); the task's own inbox makes one shipment of it. Workers keep no order:
where it matters, do the work in the consumer, or ask `newer`.
"""

import json
import os
from datetime import datetime

import psycopg
from celery import Celery
from confluent_kafka import Consumer

from cdc_outbox.inbox.confluent import consume
from cdc_outbox.inbox.psycopg import Inbox, Message

app = Celery("shipping", broker=os.environ["CELERY_BROKER_URL"])
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    broker_transport_options=json.loads(os.environ.get("CELERY_BROKER_OPTIONS", "{}")),
)
inbox = Inbox("shipping")


@app.task(  # type: ignore[untyped-decorator] # Celery has no types
    name="ship",  # else it would have another one in the consumer, whose module is __main__
    autoretry_for=(Exception,),  # a task that fails for good is gone for Celery, and so would be the shipment
    retry_backoff=True,
    max_retries=None,
)
def ship(event_id: str, committed_at: str, order: str) -> None:
    with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
        if inbox.once(connection, Message(event_id, datetime.fromisoformat(committed_at))):
            connection.execute("INSERT INTO shipment (order_id) VALUES (%s)", [json.loads(order)["order"]])


def enqueue(_connection: psycopg.Connection, message: Message) -> None:
    """If the queue is away this raises, and the message is tried again, as often as ``attempts`` says."""
    if message.value is None or message.committed_at is None:
        return  # a tombstone: nothing is to be shipped; a topic that keeps no commit times would need another inbox
    ship.delay(message.id, message.committed_at.isoformat(), message.value.decode())


def main() -> None:
    consumer = Consumer(
        {
            "bootstrap.servers": os.environ["KAFKA"],
            "group.id": os.environ.get("GROUP", "shipping"),
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    connect = lambda: psycopg.connect(os.environ["DATABASE_URL"])  # noqa: E731 - of one line
    inbox = Inbox("shipping queue")
    # ten seconds apart at last: a queue that is away for a night is waited for
    consume(consumer, connect, enqueue, inbox=inbox, topics=[os.environ["TOPIC"]], attempts=5_000)
    consumer.close()


if __name__ == "__main__":
    main()
