"""A consumer with FastStream and asyncpg: ships each order once.

NACK_ON_ERROR: by default FastStream commits an offset before the handler runs (at most once), and with ACK after it
even if it failed. max_workers=1 keeps the order of a partition. The relay compresses with lz4, which aiokafka reads
with `pip install 'aiokafka[lz4]'`.
"""

import asyncio
import os
from typing import Any

import asyncpg
from faststream import AckPolicy, FastStream
from faststream.kafka import KafkaBroker, KafkaMessage

from cdc_outbox.inbox.asyncpg import AsyncInbox, Message

broker = KafkaBroker(os.environ["KAFKA"])
app = FastStream(broker)
inbox = AsyncInbox("shipping")
pool: asyncpg.Pool


@app.on_startup
async def connect() -> None:
    global pool  # noqa: PLW0603 - FastStream's Context holds it in a larger application
    pool = await asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1)


@broker.subscriber(
    os.environ["TOPIC"],
    group_id=os.environ.get("GROUP", "shipping"),
    auto_offset_reset="earliest",
    ack_policy=AckPolicy.NACK_ON_ERROR,
    max_workers=1,
)
async def ship(order: dict[str, Any], message: KafkaMessage) -> None:
    async with pool.acquire() as connection, connection.transaction():
        if await inbox.once(connection, Message.from_faststream(message)):
            await connection.execute("INSERT INTO shipment (order_id) VALUES ($1)", order["order"])


if __name__ == "__main__":
    asyncio.run(app.run())
