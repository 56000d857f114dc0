"""Events that can never be published, and what came of them."""

import json
import os
from typing import Any

from support import command
from support.world import World, headers_of


def small(world: World) -> str:
    return f"{world.name}_small"


def too_large() -> str:
    """It does not compress either."""
    return json.dumps({"x": os.urandom(3000).hex()})


def dead_letters(world: World, *arguments: str) -> list[dict[str, Any]]:
    done = command.run(world.environment, "dead-letters", "list", "--json", *arguments)
    assert done.exit_code == 0, done
    letters: list[dict[str, Any]] = json.loads(done.out)
    return letters


def ids_of(world: World, aggregate_type: str, count: int) -> list[str | None]:
    return [dict(headers_of(message))["id"] for message in world.read(aggregate_type, count)]


def ask_for_redrive(world: World, dead_letter_id: int, *arguments: str) -> None:
    done = command.run(world.environment, "dead-letters", "redrive", str(dead_letter_id), "--no-wait", *arguments)
    assert done.exit_code == 0, done
    assert done.out == f"redrive of dead letter {dead_letter_id} requested\n"


def redrive(world: World, dead_letter_id: int, *arguments: str) -> None:
    """Whatever comes of it."""
    ask_for_redrive(world, dead_letter_id, *arguments)
    world.wait_until_confirmed()


def count(world: World) -> int:
    row = world.db.execute("SELECT count(*) FROM cdc_outbox.parked").fetchone()
    assert row
    return int(row[0])
