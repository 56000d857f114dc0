"""`prune`, `status --stuck` and the view, from outside, with a running relay."""

import orjson

from acceptance.conftest import StartRelay
from support import command
from support.waiting import wait_until
from support.world import World


def unpublished(world: World) -> int:
    row = world.db.execute("SELECT count(*) FROM cdc_outbox.event_status WHERE NOT published").fetchone()
    assert row
    return int(row[0])


def test_what_the_relay_has_published_is_pruned(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    start_relay()
    for _ in range(10):
        world.insert(aggregate_type)
    wait_until(lambda: not unpublished(world), "all of it is noted, on an idle server too", timeout_seconds=15)
    assert len(world.read(aggregate_type, 10)) == 10
    status = command.run(world.environment, "status", "--stuck", "0s")
    assert (status.exit_code, status.out) == (0, "nothing is stuck\n")
    kept = command.run(world.environment, "prune", "--older-than", "1h")
    assert (kept.exit_code, kept.out) == (0, "0 rows pruned from public.outbox\n")
    gone = command.run(world.environment, "prune", "--older-than", "0s")
    assert (gone.exit_code, gone.out) == (0, "10 rows pruned from public.outbox\n")
    assert world.db.execute("SELECT count(*) FROM outbox").fetchone() == (0,)


def test_rows_that_wait_for_a_relay_are_stuck(world: World) -> None:
    world.migrate()
    event_id = world.insert("t", "order-7")
    shown = command.run(world.environment, "status", "--stuck", "0s")
    assert event_id in shown.out
    assert "1 stuck" in shown.out
    as_json = orjson.loads(command.run(world.environment, "status", "--stuck", "0s", "--json").out)
    assert as_json["stuck"] == 1
    assert as_json["rows"][0]["outbox_id"] == event_id
    pruned = command.run(world.environment, "prune", "--older-than", "0s")
    assert pruned.out == "0 rows pruned from public.outbox\n"


def test_an_age_that_cannot_be_read_is_refused(world: World) -> None:
    refused = command.run(world.environment, "prune", "--older-than", "soon")
    assert refused.exit_code == 2
    assert "'soon' is not a length of time; write a number and s, m, h or d" in refused.err
