from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cdc_outbox.demo.relay import RelayProcess
from support.world import World  # noqa: TC001 - a fixture's annotations are read

StartRelay = Callable[..., RelayProcess]


@pytest.fixture
def start_relay(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StartRelay]:
    """Starts a relay for the test's world, with settings on top; ends what the test leaves running."""
    (name,) = {"world", "old_and_new_world", "every_world"}.intersection(request.fixturenames)
    world: World = request.getfixturevalue(name)
    with ExitStack() as stack:

        def start(*, wait: bool = True, **settings: str) -> RelayProcess:
            environment = {**world.environment, **settings}
            if "CDC_OUTBOX_HTTP__LISTEN" not in settings:
                del environment["CDC_OUTBOX_HTTP__LISTEN"]  # the process takes a free port
            relay = stack.enter_context(RelayProcess(environment, tmp_path / "relay.log"))
            if wait:
                relay.wait_until_ready()
            return relay

        yield start
