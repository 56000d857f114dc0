"""A consumer with aiokafka and asyncpg: ships each order once, a batch in one transaction, offsets after it.

The relay compresses with lz4, which aiokafka reads with `pip install 'aiokafka[lz4]'`.
"""

import asyncio
import json
import os
import signal

import asyncpg
from aiokafka import AIOKafkaConsumer

from cdc_outbox.inbox.asyncpg import AsyncInbox, Message

inbox = AsyncInbox("shipping")


async def handle(connection: asyncpg.Connection, messages: list[Message]) -> None:
    async with connection.transaction():
        for message in await inbox.once_many(connection, messages):
            order = json.loads(message.value)
            await connection.execute("INSERT INTO shipment (order_id) VALUES ($1)", order["order"])


async def main() -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    consumer = AIOKafkaConsumer(
        os.environ["TOPIC"],
        bootstrap_servers=os.environ["KAFKA"],
        group_id=os.environ.get("GROUP", "shipping"),
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    )
    async with consumer:
        while not stopping.is_set():
            for records in (await consumer.getmany(timeout_ms=200, max_records=100)).values():
                await handle(connection, [Message.from_aiokafka(record) for record in records])
                await consumer.commit()
    await connection.close()


if __name__ == "__main__":
    asyncio.run(main())
