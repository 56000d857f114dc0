"""Requests: what an operator asks of the relay, by a row of a published table that comes through the log.

A request's row carries all that is needed to act on it: what else its transaction wrote may not be visible yet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cdc_outbox.errors import OperatorNeeded
from cdc_outbox.wal.encodings import Encoding
from cdc_outbox.wal.pgoutput import Relation
from cdc_outbox.wal.row_plan import compile_insert_reader

#: The header of an event that is published again; its value is the dead letter's id.
REDRIVEN_HEADER: Final = "cdc-outbox-redriven"
_REQUESTS: Final = ("cdc_outbox", "request")
_COLUMNS: Final = ("id", "slot", "kind", "parked_id", "topic", "key", "body", "reason", "principal")


@dataclass(frozen=True, slots=True)
class RedriveRequest:
    """Publish a dead letter again."""

    id: int
    #: the slot whose relay is meant
    slot: str
    dead_letter_id: int
    #: in place of the dead letter's own
    topic: str | None
    key: bytes | None


@dataclass(frozen=True, slots=True)
class PolicyRequest:
    """Judge by this policy from here on."""

    id: int
    slot: str
    #: in UTF-8, as the file was
    source: bytes
    principal: str
    reason: str


Request = RedriveRequest | PolicyRequest
#: Of an Insert frame; None for a kind of request that is not known here.
ReadRequest = Callable[[bytes], Request | None]


def compile_request_reader(relation: Relation, encoding: Encoding) -> ReadRequest | None:
    """None if ``relation`` holds no requests. Raises OperatorNeeded if it lacks a column."""
    if (relation.namespace, relation.name) != _REQUESTS:
        return None
    try:
        read = compile_insert_reader(relation, _COLUMNS)
    except ValueError as error:
        raise OperatorNeeded(
            f"a request in {relation} comes without one of its columns",
            hint="let the publication have the table without a column list",
        ) from error

    def text(stored: bytes | None) -> str | None:
        return None if stored is None else encoding.text(stored)

    def read_request(frame: bytes) -> Request | None:
        number, slot, kind, parked_id, topic, key, body, reason, principal = read(frame)
        if kind == b"redrive":
            key = None if key is None else encoding.text(key).encode()
            return RedriveRequest(int(number), encoding.text(slot), int(parked_id), text(topic), key)
        if kind == b"policy":
            source = encoding.text(body).encode()
            return PolicyRequest(int(number), encoding.text(slot), source, text(principal) or "", text(reason) or "")
        return None

    return read_request
