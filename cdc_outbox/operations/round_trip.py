"""The doctor's round trip: a canary through the real path, from INSERT to Kafka's acknowledgement, timed.

Stream, pipeline and delivery are the relay's own; the slot is a temporary one, so nothing is confirmed, and only
canaries are routed, so nobody's events are sent.
"""

import os
import time
from contextlib import closing
from typing import Final

from cdc_outbox.config import Config
from cdc_outbox.errors import CdcOutboxError, OperatorNeeded
from cdc_outbox.kafka.acknowledged import AcknowledgedDelivery
from cdc_outbox.kafka.topics import Topics
from cdc_outbox.operations.findings import Finding
from cdc_outbox.postgres.canary import plant
from cdc_outbox.postgres.connection import connect_bounded
from cdc_outbox.postgres.stream import ReplicationStream
from cdc_outbox.relay.pipeline import Pipeline
from cdc_outbox.relay.router import Routing, Strays
from cdc_outbox.relay.stops import Full, Parking
from cdc_outbox.service.canary import make_canary_router

_CHECK: Final = "round trip"
_PATIENCE_SECONDS: Final = 10.0
#: A slot can begin only when the transactions that are open have ended.
_SLOT_SECONDS: Final = 5


def make_round_trip(config: Config, delivery: AcknowledgedDelivery) -> Finding:
    topics = Topics(delivery, create=config.kafka.create_topics)
    try:
        topics.connect()
        topics.require(config.canary.topic, create=True)
    except CdcOutboxError as error:
        return Finding(_CHECK, "warning", f"not tried: {error.message}", error.hint)
    try:
        with ReplicationStream(config.postgres.dsn.get_secret_value()) as stream:
            slot = f"cdc_outbox_doctor_{os.getpid()}"
            stream.create_temporary_slot(slot, lock_timeout_seconds=_SLOT_SECONDS)
            stream.start(slot, config.postgres.publication)
            seconds = _carry_one(config, stream, delivery, slot)
    except CdcOutboxError as error:
        return Finding(_CHECK, "failed", error.message, error.hint)
    return Finding(
        _CHECK, "ok", f"a canary was in {config.canary.topic} {seconds * 1000:.0f} ms after its commit began"
    )


def _carry_one(config: Config, stream: ReplicationStream, delivery: AcknowledgedDelivery, slot: str) -> float:
    """Seconds from INSERT to acknowledgement. Raises OperatorNeeded if it does not arrive."""
    pipeline = Pipeline(Routing([make_canary_router(config)], Strays(), set()), delivery)
    began = time.monotonic()
    with closing(connect_bounded(config.postgres.dsn.get_secret_value())) as connection:
        plant(connection, slot)
    while time.monotonic() - began < _PATIENCE_SECONDS:
        frames = stream.frames()
        while isinstance(stop := pipeline.feed(frames), Full):
            delivery.poll(0.05)
        if isinstance(stop, Parking):
            raise stop.poison
        pipeline.close_batch()
        delivery.flush(0.01)
        if any(config.canary.topic in batch.per_topic for batch in pipeline.watermark.advance()):
            return time.monotonic() - began
        if not stream.receive():
            stream.wait(0.05)
    raise OperatorNeeded(
        f"a canary was committed, but did not arrive within {_PATIENCE_SECONDS:.0f} s",
        hint="see that the publication lists cdc_outbox.canary (cdc-outbox migrate up adds it), and look at the broker",
    )
