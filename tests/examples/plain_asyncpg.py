"""An application with asyncpg: places an order, and says so, in one transaction."""

import asyncio
import os

import asyncpg

from cdc_outbox.outbox.asyncpg import AsyncOutbox, Event

outbox = AsyncOutbox()


async def place_order(pool: asyncpg.Pool, customer: str, total: int) -> int:
    async with pool.acquire() as connection, connection.transaction():
        order_id = int(
            await connection.fetchval(
                "INSERT INTO orders (customer, total) VALUES ($1, $2) RETURNING id", customer, total
            )
        )
        placed = {"order": order_id, "customer": customer, "total": total}
        await outbox.emit(connection, Event("order.placed", str(order_id), placed, aggregate_type="order"))
    return order_id


async def main() -> None:
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1) as pool:
        print(await place_order(pool, "Ada", 620))


if __name__ == "__main__":
    asyncio.run(main())
