"""A web application with FastAPI and SQLAlchemy's ORM: POST /orders places an order, and says so, in one transaction.

uvicorn examples.fastapi_sqlalchemy:app
"""

import os

from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from cdc_outbox.outbox.sqlalchemy import AsyncOutbox, Event

# hide_parameters: an error's text then holds no payload
engine = create_async_engine(os.environ["SQLALCHEMY_URL"], hide_parameters=True)
new_session = async_sessionmaker(engine, expire_on_commit=False)
outbox = AsyncOutbox()
app = FastAPI()


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    total: Mapped[int]


class OrderIn(BaseModel):
    customer: str
    total: int


class OrderPlaced(BaseModel):
    order: int
    customer: str
    total: int


@app.post("/orders", status_code=201)
async def place_order(body: OrderIn) -> OrderPlaced:
    async with new_session.begin() as session:  # committed at its end, before there is an answer
        order = Order(customer=body.customer, total=body.total)
        session.add(order)
        await session.flush()  # the database gives order.id now
        placed = OrderPlaced(order=order.id, customer=body.customer, total=body.total)
        await outbox.emit(session, Event("order.placed", str(order.id), placed, aggregate_type="order"))
    return placed
