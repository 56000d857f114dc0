"""What the tests of the inbox share."""

from support.world import World


def is_waiting(world: World) -> bool:
    query = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    return world.db.execute(query).rowcount > 0
