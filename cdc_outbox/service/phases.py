"""What a relay is doing, in one word. The metric and /readyz's ``state`` speak of five kinds of it: their names are a
contract. /readyz says the phase besides.
"""

from enum import Enum
from typing import Final

STARTING: Final = "starting"
STANDBY: Final = "standby"
STREAMING: Final = "streaming"
WAITING: Final = "waiting"
HALTED: Final = "halted"
STATES: Final = (STARTING, STREAMING, STANDBY, WAITING, HALTED)


class Phase(Enum):
    """connecting -> standby -> reading -> draining; from each of them to backoff, and from there on again."""

    #: for the first time
    CONNECTING = "connecting", STARTING
    #: another relay has the slot
    STANDBY = "standby", STANDBY
    READING = "reading", STREAMING
    #: events are published one by one, to find one that the broker refuses
    ISOLATING = "isolating", STREAMING
    #: a stop was asked for: what was read is published and confirmed
    DRAINING = "draining", STREAMING
    #: connected, but one side does not go on
    STALLED = "stalled", WAITING
    #: a side was lost, or refused; connecting again
    BACKOFF = "backoff", WAITING
    #: an operator is needed
    HALTED = "halted", HALTED

    def __init__(self, label: str, state: str) -> None:
        self.label = label
        self.state = state
