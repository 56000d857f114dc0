"""The canary: a row planted every so often that goes the way of every event, into a topic of its own.

Its age tells of an outbox that is silent because nothing arrives from one that is silent because nothing happens.
"""

import time
from collections.abc import Callable
from typing import Final

from cdc_outbox.config import Config
from cdc_outbox.postgres.monitor import Monitor
from cdc_outbox.relay.router import Outbox, Router, TopicTemplate
from cdc_outbox.service.health import Health
from cdc_outbox.service.metrics import Metrics

_OUTBOX: Final = Outbox("cdc_outbox", "canary", {})


def make_canary_router(config: Config, require_topic: Callable[[str], None]) -> Router:
    """Routes canaries and nothing else."""
    return Router(
        _OUTBOX, TopicTemplate(config.canary.topic), config.kafka.headers, "/cdc-outbox/canary", require_topic
    )


class Canary:
    """Plants on the monitor's connection while the relay streams; a standby plants none."""

    def __init__(self, every_seconds: float, monitor: Monitor, health: Health, metrics: Metrics) -> None:
        """``every_seconds`` 0: never."""
        self._every_seconds = every_seconds
        self._monitor = monitor
        self._health = health
        self._metrics = metrics
        self._planted_at = float("-inf")

    def plant_when_due(self) -> float:
        """Seconds until it wants to be called again, infinity if never. Raises as ``plant`` does."""
        if not self._every_seconds:
            return float("inf")
        if self._health.state != "streaming":
            if self._health.state == "standby":
                self._metrics.expect_canary(expected=False)
            return self._every_seconds
        now = time.monotonic()
        if now - self._planted_at >= self._every_seconds:
            self._monitor.plant_canary()
            self._planted_at = now
            self._metrics.expect_canary(expected=True)
        return self._planted_at + self._every_seconds - now
