from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cdc_outbox.demo.relay import RelayProcess
from support.world import World

StartRelay = Callable[..., RelayProcess]


@pytest.fixture
def start_relay(world: World, tmp_path: Path) -> Iterator[StartRelay]:
    """Starts a relay for this world, with settings on top; ends what the test leaves running."""
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
