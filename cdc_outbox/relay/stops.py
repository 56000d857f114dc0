"""Why the pipeline stopped: what the session has to do before it feeds the pipeline again."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from cdc_outbox.errors import PoisonEvent
from cdc_outbox.relay.requests import RedriveRequest, Request
from cdc_outbox.relay.router import EventDescription, Record
from cdc_outbox.relay.watermark import Batch
from cdc_outbox.wal.position import Position

if TYPE_CHECKING:
    from cdc_outbox.relay.policy.gate import Ruling


@dataclass(frozen=True, slots=True)
class Dry:
    """The frames that have arrived are all carried."""


@dataclass(frozen=True, slots=True)
class Drained:
    """The pipeline is draining, and stands between two transactions."""


@dataclass(frozen=True, slots=True)
class BatchFull:
    """As many events as belong together are carried; it stands between two transactions."""


@dataclass(frozen=True, slots=True)
class Full:
    """As much is in flight as may be; an event waits for room."""


@dataclass(frozen=True, slots=True)
class NewTopic:
    """An event waits until somebody has looked whether its topic is there: `Pipeline.admit`, or `Pipeline.refuse`."""

    topic: str


@dataclass(frozen=True, slots=True)
class Parking:
    """An event can never be published. It is settled once it is kept durably."""

    event: EventDescription
    position: Position
    commit_time_ms: int
    poison: PoisonEvent
    #: the topic that has refused it; empty if it came to none: what data says of it may be anything
    refused_by: str = ""
    #: nobody would miss it
    expendable: bool = False


@dataclass(frozen=True, slots=True)
class Denied:
    """The policy keeps an event inside. It is outstanding in ``batch`` until that is recorded durably."""

    event: EventDescription
    batch: Batch
    position: Position
    commit_time_ms: int
    ruling: "Ruling"
    policy_sha256: bytes
    #: as Kafka would have got it
    record: Record


@dataclass(frozen=True, slots=True)
class Requested:
    """An operator asks for something, at this place of the stream: `Pipeline.redrive`, or `Pipeline.govern`."""

    request: Request


@dataclass(frozen=True, slots=True)
class RedriveRefused:
    """What was to be published again can still not be."""

    request: RedriveRequest
    poison: PoisonEvent


Stop: TypeAlias = Dry | Drained | BatchFull | Full | NewTopic | Parking | Denied | Requested | RedriveRefused

DRY: Final = Dry()
DRAINED: Final = Drained()
BATCH_FULL: Final = BatchFull()
FULL: Final = Full()
