"""A pipeline without a world: an outbox's frames, a publisher that delivers when told, what the session would do."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pytest

from cdc_outbox.errors import CdcOutboxError, PoisonEvent
from cdc_outbox.relay.pipeline import DeadLetter, Pipeline
from cdc_outbox.relay.requests import RedriveRequest
from cdc_outbox.relay.router import Outbox, Record, Router, Routing, Strays
from cdc_outbox.relay.stops import Denied, Drained, Dry, Full, NewTopic, Parking, RedriveRefused, Requested, Stop
from cdc_outbox.relay.topic_template import TopicTemplate
from cdc_outbox.wal.position import Position
from support import frames

if TYPE_CHECKING:
    from cdc_outbox.relay.policy.gate import Gates

OUTBOX = {"id": 2950, "aggregate_type": 25, "aggregate_id": 25, "event_type": 25, "payload": 114}


RELATION = frames.relation(7, "outbox", OUTBOX)


REQUEST = {
    "id": 20,
    "slot": 25,
    "kind": 25,
    "parked_id": 20,
    "topic": 25,
    "key": 25,
    "body": 25,
    "reason": 25,
    "principal": 25,
}


class Refused(Exception):
    pass


class FakePublisher:
    """Takes what is published; delivers when told."""

    refusal: type[Exception] = Refused

    def __init__(self, *, room: int = 10**9) -> None:
        self.room = room
        self.taken: list[tuple[Any, ...]] = []
        self.refuse = False

    def publish(self, *record: Any) -> None:
        if self.refuse:
            raise Refused
        if not self.room:
            raise BufferError
        self.room -= 1
        self.taken.append(record)

    def deliver(self, count: int | None = None) -> None:
        for record in self.taken[:count]:
            record[4](None, None)
        del self.taken[:count]

    def explain(self, refusal: Any, topic: str) -> CdcOutboxError:
        return PoisonEvent(f"refused by {topic}: {refusal!r}", reason="refused")

    def on_failure(self, error: Any, message: Any) -> None:
        raise AssertionError(error, message)


class Driver:
    """Feeds a pipeline and does what it stops for, as the session does, without a world."""

    def __init__(
        self, publisher: FakePublisher, *, settled: Iterable[Position] = (), strays: Strays | None = None
    ) -> None:
        outbox, known = Outbox("public", "outbox", {name: (name,) for name in OUTBOX}), set[str]()
        router = Router(outbox, TopicTemplate("outbox.{aggregate_type}"), "plain", "", known)
        by_commit: dict[int, set[int]] = {}
        for position in settled:
            by_commit.setdefault(position.commit_lsn, set()).add(position.ordinal)
        self.pipeline = Pipeline(Routing([router], strays or Strays(), known), publisher, by_commit)
        self.watermark = self.pipeline.watermark
        self.kept: list[Parking] = []
        self.refused: list[tuple[int, str]] = []
        self.denied: list[Denied] = []
        #: what a request for a policy puts in force
        self.gates: Gates | None = None
        #: dead letters that may be asked for
        self.records: dict[int, Record] = {}
        #: what to do for want of room
        self.make_room: Callable[[], object] = lambda: pytest.fail("no room")
        self.topics: list[str] = []

    def feed(self, frames: Iterable[bytes]) -> None:
        frames = iter(frames)
        while True:
            stop = self.pipeline.feed(frames)
            self.pipeline.close_batch()
            if isinstance(stop, Dry | Drained):
                return
            self.act_on(stop)

    def act_on(self, stop: Stop) -> None:
        match stop:
            case Full():
                self.make_room()
            case NewTopic(topic):
                self.topics.append(topic)
                self.pipeline.admit(topic)
            case Parking():
                self.kept.append(stop)
            case Requested(RedriveRequest() as request):
                if record := self.records.get(request.dead_letter_id):
                    self.pipeline.redrive(request, DeadLetter(record))
            case Requested():
                if self.gates is not None:
                    self.pipeline.govern(self.gates)
            case Denied():
                self.denied.append(stop)
                stop.batch.outstanding -= 1  # recorded
            case RedriveRefused(request, poison):
                self.refused.append((request.dead_letter_id, poison.reason))

    def no_room_will_come(self) -> None:
        self.act_on(self.pipeline.refuse(PoisonEvent("too large", reason="queue_too_small")))


def make(publisher: FakePublisher, strays: Strays | None = None, settled: Iterable[Position] = ()) -> Driver:
    return Driver(publisher, strays=strays, settled=settled)


def event(number: int) -> bytes:
    return frames.insert(7, [b"e%d" % number, b"order", b"a", b"t", b"{}"])


def redrive(number: int, dead_letter: int, topic: bytes | None = None) -> bytes:
    return frames.insert(9, [b"%d" % number, b"s", b"redrive", b"%d" % dead_letter, topic, None, None, None, b"me"])


def transaction(commit_lsn: int, *events: bytes) -> list[bytes]:
    return [frames.begin(commit_lsn, time_us=1000), *events, frames.commit(commit_lsn, commit_lsn + 1)]
