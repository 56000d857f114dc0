"""FastStream with parking: an order that cannot be shipped is kept, and with it what follows of its key.

The others go on. It is tried five times; then `cdc-outbox inbox list` shows it, and `unpark` has it handled, when what
it needs is there. A second task takes what is due. For FastStream itself see consumer_faststream.py.
"""

import asyncio
import json
import logging
import os
from typing import Any

import asyncpg
from faststream import AckPolicy, FastStream
from faststream.kafka import KafkaBroker, KafkaMessage

from cdc_outbox.inbox.asyncpg import AsyncInbox, Message
from cdc_outbox.transactions.asyncpg import Connection

broker = KafkaBroker(os.environ["KAFKA"])
app = FastStream(broker)
inbox = AsyncInbox("shipping")
logger = logging.getLogger(__name__)
ATTEMPTS = 5
pool: asyncpg.Pool
retrying: asyncio.Task[None]


async def ship(connection: Connection, event: Message) -> None:
    order = json.loads(event.value)
    address = await connection.fetchval("SELECT address FROM address WHERE customer = $1", order["customer"])
    if address is None:
        raise LookupError(f"no address of {order['customer']}")
    await connection.execute("INSERT INTO shipment (order_id) VALUES ($1)", order["order"])


@broker.subscriber(
    os.environ["TOPIC"],
    group_id=os.environ.get("GROUP", "shipping"),
    auto_offset_reset="earliest",
    ack_policy=AckPolicy.NACK_ON_ERROR,
    max_workers=1,
)
async def take(message: KafkaMessage) -> None:
    async with pool.acquire() as connection:
        try:
            event = Message.from_faststream(message)
        except ValueError as error:  # no id, or a time that is none: a person decides
            record: Any = message.raw_message
            await park(connection, Message.nameless(record), error, attempts=1)
            return
        try:
            async with connection.transaction():
                if await inbox.once(connection, event) and await inbox.park_followers(connection, [event]):
                    await ship(connection, event)
        except Exception as error:  # noqa: BLE001 - if it is the database that is away, parking fails too: NACK
            await park(connection, event, error)


async def retry_for_ever() -> None:
    while True:
        try:
            async with pool.acquire() as connection:
                await retry(connection)
        except Exception:
            logger.exception("parked orders cannot be tried now")
        await asyncio.sleep(0.5)


async def retry(connection: Connection) -> None:
    """What was unparked, and what failed a moment ago."""
    while event := await inbox.due(connection, attempts=ATTEMPTS):
        try:
            async with connection.transaction():
                if await inbox.retry(connection, event):
                    await ship(connection, event)
        except Exception as error:  # noqa: BLE001 - it is kept
            await park(connection, event, error)


async def park(connection: Connection, event: Message, error: Exception, attempts: int = ATTEMPTS) -> None:
    async with connection.transaction():
        await inbox.park(connection, event, error, attempts=attempts)


@app.on_startup
async def connect() -> None:
    global pool, retrying  # noqa: PLW0603 - FastStream's Context holds them in a larger application
    pool = await asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=2)
    retrying = asyncio.create_task(retry_for_ever())


@app.after_shutdown
async def disconnect() -> None:
    retrying.cancel()
    await pool.close()


if __name__ == "__main__":
    asyncio.run(app.run())
