"""Dead letters: what the pipeline does with an event that can never be published, and with a request to try again.

Pure: where they are kept, and whether they are kept at all (`relay.on_poison`), is `service.state`'s business.
"""

from dataclasses import dataclass
from typing import Final, Protocol

from cdc_outbox.errors import PoisonEvent
from cdc_outbox.relay.router import EventDescription, Record
from cdc_outbox.wal.lsn import LSN

#: An operator asks for a dead letter to be published again by a row in this table; its rows come through the log.
REDRIVE_REQUESTS: Final = ("cdc_outbox", "redrive_request")
#: The header that tells consumers of such an event; its value is the dead letter's id.
REDRIVEN_HEADER: Final = "cdc-outbox-redriven"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An event, its place in the log, and why it can never be published."""

    event: EventDescription
    commit_lsn: LSN
    #: which event of its transaction, from 1; with the commit LSN, its identity
    ordinal: int
    commit_time_ms: int
    poison: PoisonEvent
    #: the topic that has refused it; empty if it came to none: what data says of it may be anything
    refused_by: str = ""
    expendable: bool = False


@dataclass(frozen=True, slots=True)
class RedriveRequest:
    id: int
    #: the slot whose relay is meant
    slot: str
    dead_letter_id: int
    #: in place of the dead letter's own
    topic: str | None
    key: bytes | None


class DeadLetters(Protocol):
    def put(self, letter: DeadLetter) -> None:
        """Settle the event by keeping it durably, or raise PoisonEvent to stop before it."""
        ...

    def settled_ordinals(self, commit_lsn: int) -> frozenset[int]:
        """Which events of a transaction were put away before the relay was started anew."""
        ...

    def take(self, request: RedriveRequest) -> Record | None:
        """What is to be published; None if there is nothing (any more) to be done about the request."""
        ...

    def refused_again(self, request: RedriveRequest, reason: PoisonEvent) -> None: ...
