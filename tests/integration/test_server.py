"""Whether two connections have reached the same server."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from cdc_outbox.errors import SourceUnavailable
from cdc_outbox.postgres.connection import connect
from cdc_outbox.postgres.server import check_same_server
from cdc_outbox.postgres.stream import ReplicationStream
from support.world import World


def test_the_same_server(every_world: World) -> None:
    with ReplicationStream(every_world.dsn) as stream:
        check_same_server(every_world.db, stream.identify())


def test_another_server(every_world: World, postgres: str, other_postgres: Callable[[str], str]) -> None:
    others = [postgres, *map(other_postgres, ["14", "17"])]
    with ReplicationStream(every_world.dsn) as stream:
        streamed = stream.identify()
        for dsn in others:
            with connect(dsn) as connection:
                if connection.info.port != every_world.db.info.port:
                    with pytest.raises(SourceUnavailable, match="leads to two servers: system"):
                        check_same_server(connection, streamed)


@pytest.mark.parametrize("difference", [{"timeline": 9}, {"is_standby": True}])
def test_another_history_of_the_same_server(every_world: World, difference: dict[str, object]) -> None:
    """A primary and its standby, or one that was promoted meanwhile."""
    with ReplicationStream(every_world.dsn) as stream:
        streamed = replace(stream.identify(), **difference)  # type: ignore[arg-type]
    with pytest.raises(SourceUnavailable, match="leads to two servers"):
        check_same_server(every_world.db, streamed)
