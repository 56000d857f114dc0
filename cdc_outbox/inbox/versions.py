"""The latest version of each aggregate that a consumer has seen: an older event, or the same again, is told from it.

Pure. For projections: what counts there is the latest state, not each event. An aggregate is a topic and a key.
"""

import json
from typing import Final

from cdc_outbox.inbox.message import Message, is_storable
from cdc_outbox.transactions import Statement, Steps

_DIGITS: Final = 20
_LONGEST_BYTES: Final = 500


class VersionTable:
    def __init__(self, consumer: str, table: str) -> None:
        """``table`` is quoted."""
        self._consumer = consumer
        self._advance = _advance(table)

    def newer(self, message: Message, version: int | str | None) -> Steps[bool]:
        """Raises ValueError."""
        if message.key is None:
            raise ValueError(f"message {message.id!r} has no key: it belongs to no aggregate, so nothing is newer")
        parameter = {
            "consumer": self._consumer,
            "source": message.source,
            "topic": message.topic,
            "subject": _checked(message.key, "key"),
            "version": _comparable(version, message.sequence),
        }
        return bool((yield self._advance, json.dumps(parameter, ensure_ascii=False)))


def _comparable(version: int | str | None, sequence: str | None) -> str:
    """Text that is ordered as the versions are, its kind in front; of the message's sequence without a version.

    Raises ValueError.
    """
    if version is None and sequence:
        return "s" + _checked(sequence, "header sequence")
    if isinstance(version, bool) or version is None or not isinstance(version, int | str):
        raise ValueError(
            f"the version is {version!r}: give version=, a whole number or a text that is ordered byte by byte;"
            " this message has no header sequence"
        )
    if isinstance(version, int):
        if not 0 <= version < 10**_DIGITS:
            raise ValueError(f"version {version} is negative, or has more than {_DIGITS} digits")
        return f"n{version:0{_DIGITS}d}"
    if version.isdecimal() and len(version) < _DIGITS:
        raise ValueError(f"version {version!r} is a number in a text, where 10 comes before 9: give it as a number")
    return "t" + _checked(version, "version")


def _checked(text: str, name: str) -> str:
    if not text or not is_storable(text, longest_bytes=_LONGEST_BYTES):
        raise ValueError(f"the {name} is empty, has a NUL in it, is no text, or has over {_LONGEST_BYTES} bytes")
    return text


def _advance(table: str) -> Statement:
    """The row, if it is the first, or now holds a later version, or one of another kind: those cannot be compared.

    A session that has it right now is waited for.
    """
    return Statement(
        "WITH given AS (SELECT CAST(CAST(",
        f""" AS text) AS json) AS given)
        INSERT INTO {table} AS known (consumer, source, topic, subject, version)
        SELECT given ->> 'consumer', given ->> 'source', given ->> 'topic', given ->> 'subject', given ->> 'version'
          FROM given
        ON CONFLICT (consumer, source, topic, subject) DO UPDATE SET version = EXCLUDED.version
         WHERE known.version < EXCLUDED.version OR left(known.version, 1) <> left(EXCLUDED.version, 1)
        RETURNING 1""",
        returns=True,
    )
