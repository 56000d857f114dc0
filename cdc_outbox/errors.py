"""The one tree of errors, split by *what to do about it*.

A message names the thing (slot, relation, LSN, topic, key of the configuration), never a payload or a password;
the hint says how to fix it. The edges translate library exceptions into these with ``raise ... from``;
``service.relay`` alone decides what is tried again; ``cli`` alone turns them into exit codes.

    CdcOutboxError
    ├── ConfigurationError      correct the configuration or the command line     exit 2
    ├── UnavailableError        try again with backoff; `run` never exits on it
    │   ├── SourceUnavailable   PostgreSQL
    │   │   └── ServerStopping  it is being stopped, and waits for us to close the stream
    │   └── BrokerUnavailable   Kafka
    │       └── BatchRefused    one event of a batch, but which? Try again one by one
    ├── SlotInUse               another relay leads: stand by
    ├── OperatorNeeded          nothing the relay can do by itself             exit 3
    │   ├── TopicRefused        Kafka takes nothing for this topic
    │   ├── MalformedStream     bytes that are wrong or not supported
    │   └── PoisonEvent         an event that can never be published
    ├── CheckFailed             `doctor`, `demo`: the check ran and said no    exit 4
    └── BrokenInvariant         a bug of ours                                  exit 1
"""

from typing import ClassVar


class CdcOutboxError(Exception):
    """Base of all: one line of what is wrong, and optionally one of how to fix it."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigurationError(CdcOutboxError):
    exit_code = 2


class UnavailableError(CdcOutboxError):
    """Exits with 3 only from one-shot verbs, which do not retry."""

    exit_code = 3
    side: ClassVar[str]


class SourceUnavailable(UnavailableError):
    side = "postgres"


class ServerStopping(SourceUnavailable):
    pass


class BrokerUnavailable(UnavailableError):
    side = "kafka"


class BatchRefused(BrokerUnavailable):
    """The broker did not take a batch, and does not say which of its events was the cause, if one was."""


class SlotInUse(CdcOutboxError):
    exit_code = 3


class OperatorNeeded(CdcOutboxError):
    exit_code = 3


class TopicRefused(OperatorNeeded):
    """``topic`` is not there, or must not be written to."""

    def __init__(self, message: str, *, topic: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.topic = topic


class MalformedStream(OperatorNeeded):
    """The server sent what the protocol does not allow, or what this relay does not support."""


class PoisonEvent(OperatorNeeded):
    """An event that no retry will ever publish. ``reason`` is one word for metrics and filters."""

    def __init__(self, message: str, *, reason: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class CheckFailed(CdcOutboxError):
    exit_code = 4


class BrokenInvariant(CdcOutboxError):
    exit_code = 1
