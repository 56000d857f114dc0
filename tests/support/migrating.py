"""`migrate up`, and how its files stand."""

import psycopg
from psycopg import sql

from cdc_outbox.config import ColumnsConfig
from cdc_outbox.operations import migrations
from cdc_outbox.operations.migrations import Target
from cdc_outbox.postgres.connection import connect
from support.world import World


def target(world: World, *, table: str = "public.outbox", publication: str = "cdc_outbox", **columns: str) -> Target:
    return Target(table, publication, world.slot, ColumnsConfig(**columns))


def up(world: World, wanted: Target | None = None, *, failover: bool = False) -> list[str]:
    steps: list[str] = []
    with connect(world.dsn) as connection:
        migrations.up(connection, wanted or target(world), failover=failover, report=steps.append)
    return steps


def as_role(world: World, role: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(world.dsn) as connection:
        connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []
