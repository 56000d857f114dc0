"""An application with psycopg: places an order, and says so, in one transaction."""

import os

import psycopg

from cdc_outbox.outbox.psycopg import Event, Outbox

outbox = Outbox()


def place_order(connection: psycopg.Connection, customer: str, total: int) -> int:
    with connection.transaction():
        row = connection.execute(
            "INSERT INTO orders (customer, total) VALUES (%s, %s) RETURNING id", [customer, total]
        ).fetchone()
        assert row is not None
        order_id = int(row[0])
        placed = {"order": order_id, "customer": customer, "total": total}
        outbox.emit(connection, Event("order.placed", str(order_id), placed, aggregate_type="order"))
    return order_id


if __name__ == "__main__":
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        print(place_order(connection, "Ada", 620))
