"""Attempts that are written down before they are made: how often a message was being handled when its process ended.

Pure. Not needed where a handler fails: it says so. A crash of the process is found by what was written before it.
"""

import json
from collections.abc import Iterable
from typing import Final

from cdc_outbox.inbox.message import Message
from cdc_outbox.transactions import Statement, Steps

#: Why a message is parked that was begun too often, and never ended.
DIED: Final = "the process ended, or its connection was lost, while it was handling this, each time"


class AttemptTable:
    def __init__(self, consumer: str, table: str) -> None:
        """``table`` is quoted."""
        self._consumer = consumer
        self._count = _count(table)
        self._uncount = _uncount(table)
        self._forget = _forget(table)

    def count(self, message: Message) -> Steps[int]:
        """How many there are, with the one that is about to be made."""
        ((attempts,),) = yield self._count, self._parameter([message])
        return int(attempts)

    def uncount(self, messages: Iterable[Message]) -> Steps[None]:
        yield self._uncount, self._parameter(messages)

    def forget(self, messages: Iterable[Message]) -> Steps[None]:
        yield self._forget, self._parameter(messages)

    def _parameter(self, messages: Iterable[Message]) -> str:
        keys = [[message.source, message.id] for message in messages]
        return json.dumps({"consumer": self._consumer, "messages": keys}, ensure_ascii=False)


_BEFORE: Final = "WITH given AS MATERIALIZED (SELECT * FROM json_to_record(CAST(CAST("
_AFTER: Final = """ AS text) AS json)) AS given (consumer text, messages json)), message AS (
    SELECT consumer, one ->> 0 AS source, one ->> 1 AS message_id FROM given, json_array_elements(messages) AS one)"""
_IS_GIVEN: Final = (
    "(known.consumer, known.source, known.message_id) = (message.consumer, message.source, message.message_id)"
)


def _count(table: str) -> Statement:
    return Statement(
        _BEFORE,
        f"""{_AFTER}
        INSERT INTO {table} AS known (consumer, source, message_id, attempts)
        SELECT consumer, source, message_id, 1 FROM message
        ON CONFLICT (consumer, source, message_id) DO UPDATE SET attempts = known.attempts + 1, changed_at = now()
        RETURNING attempts""",
        returns=True,
    )


def _uncount(table: str) -> Statement:
    return Statement(
        _BEFORE,
        f"""{_AFTER}
        UPDATE {table} AS known SET attempts = known.attempts - 1 FROM message WHERE {_IS_GIVEN}""",
    )


def _forget(table: str) -> Statement:
    return Statement(
        _BEFORE,
        f"""{_AFTER}
        DELETE FROM {table} AS known USING message WHERE {_IS_GIVEN}""",
    )
