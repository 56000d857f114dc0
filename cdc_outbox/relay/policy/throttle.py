"""Throttling by GCRA, the generic cell rate algorithm: one number for each key, no clock of its own.

Source: ITU-T I.371; as a scheduler: an event that comes too early gets the slot in which it conforms.
"""

from cdc_outbox.relay.policy.document import Rate


class Slots:
    """Gives each event of a key the earliest time at which it keeps to the rate; bursts of ``rate.events`` may pass."""

    def __init__(self, rate: Rate) -> None:
        self._interval_seconds = rate.seconds / rate.events
        self._burst_seconds = rate.seconds - self._interval_seconds
        #: by key: when it would have used up all that it was given, in seconds
        self._used_until: dict[tuple[str | None, ...], float] = {}

    def wait_seconds(self, key: tuple[str | None, ...], now: float) -> float:
        """How long an event that comes at ``now`` waits; 0 if it conforms. The slot is taken."""
        until = max(self._used_until.get(key, 0.0), now)
        self._used_until[key] = until + self._interval_seconds
        return max(0.0, until - self._burst_seconds - now)

    def give_back(self, key: tuple[str | None, ...]) -> None:
        """The slot of an event that does not come after all."""
        self._used_until[key] -= self._interval_seconds
