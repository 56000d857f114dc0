"""The canary: a row planted every so often that goes the way of every event, into a topic of its own.

Its age tells of an outbox that is silent because nothing arrives from one that is silent because nothing happens. It
only watches: whatever is wrong with it is said, and events go on.
"""

import time
from typing import Final

from cdc_outbox.config import Config
from cdc_outbox.errors import BrokerUnavailable, CdcOutboxError, OperatorNeeded, TopicRefused
from cdc_outbox.kafka.topics import Topics
from cdc_outbox.postgres.monitor import Monitor
from cdc_outbox.relay.router import Outbox, Router
from cdc_outbox.relay.topic_template import TopicTemplate
from cdc_outbox.service.health import Health
from cdc_outbox.service.logs import get_logger
from cdc_outbox.service.metrics import Metrics
from cdc_outbox.service.phases import Phase

#: How many sessions may fail for the sake of the canary's topic.
_PATIENCE: Final = 3
_OUTBOX: Final = Outbox("cdc_outbox", "canary", {})


def make_canary_router(config: Config) -> Router:
    """Routes canaries and nothing else, to a topic that is there."""
    return Router(
        _OUTBOX,
        TopicTemplate(config.canary.topic),
        config.kafka.headers,
        "/cdc-outbox/canary",
        {config.canary.topic},
        expendable=True,
    )


class Canary:
    """Plants on the monitor's connection while the relay streams; a standby plants none."""

    def __init__(self, every_seconds: float, topic: str, monitor: Monitor, health: Health, metrics: Metrics) -> None:
        """``every_seconds`` 0: never."""
        self._every_seconds = every_seconds
        self._topic = topic
        self._monitor = monitor
        self._health = health
        self._metrics = metrics
        self._planted_at = float("-inf")
        #: whether canaries have a topic to go to
        self._has_topic = False
        #: for good, as long as this process lives
        self._is_given_up = False
        #: times that the broker did not say whether it could be made
        self._failures = 0
        self._trouble = ""

    def prepare(self, topics: Topics) -> bool:
        """Whether canaries are to be routed: they are wanted, and their topic is there or could be made.

        Raises BrokerUnavailable, a few times.
        """
        self._has_topic = False
        if self._every_seconds and not self._is_given_up:
            try:
                topics.require(self._topic, create=True)
                self._has_topic = True
            except OperatorNeeded as error:
                self._say(error)
            except BrokerUnavailable as error:  # it passes; if it does not, events are not to wait for it
                self._failures += 1
                if self._failures < _PATIENCE:
                    raise
                self._say(error)
        return self._has_topic

    def give_up(self, error: TopicRefused) -> bool:
        """If it is the canaries' topic that is refused: send none any more. Whether that is so."""
        if error.topic != self._topic or not self._has_topic:
            return False
        self._has_topic, self._is_given_up = False, True
        self._say(error)
        return True

    def plant_when_due(self) -> float:
        """Seconds until it wants to be called again, infinity if never. Raises SourceUnavailable."""
        if not self._every_seconds:
            return float("inf")
        if not self._health.is_streaming:
            if self._health.phase is Phase.STANDBY:
                self._metrics.expect_canary(expected=False)
            return self._every_seconds
        now = time.monotonic()
        if now - self._planted_at >= self._every_seconds:
            self._plant()
            self._planted_at = now
            self._metrics.expect_canary(expected=True)  # one that cannot be planted is one that does not arrive
        return self._planted_at + self._every_seconds - now

    def _plant(self) -> None:
        if not self._has_topic:
            return
        try:
            self._monitor.plant_canary()
        except OperatorNeeded as error:
            self._say(error)

    def _say(self, error: CdcOutboxError) -> None:
        """Once, not every few seconds."""
        if error.message != self._trouble:
            self._trouble = error.message
            self._health.remember(error)
            get_logger().warning("no_canary", reason=error.message, hint=error.hint)
