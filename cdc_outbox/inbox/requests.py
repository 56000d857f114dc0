"""Requests with an idempotency key: the first is carried out, and its response kept for those that come again.

Pure. The key, a hash of the request's body and the response are one row, written in the transaction that carries the
request out: if that rolls back, the key is as if it had never come. Source: draft-ietf-httpapi-idempotency-key-header.
"""

import hashlib
import json
from typing import Any, Final, TypeAlias

from cdc_outbox.inbox.message import is_storable
from cdc_outbox.inbox.stored import stored_value, value_of
from cdc_outbox.transactions import Statement, Steps

_LONGEST_KEY_BYTES: Final = 1_000
#: SQLSTATE lock_not_available: what lock_timeout ends with.
LOCK_NOT_AVAILABLE: Final = "55P03"


class IdempotencyKeyReused(ValueError):
    """The key came before, with another body. HTTP: 422 Unprocessable Content."""


class InProgress(RuntimeError):
    """The first request with this key is still being carried out. HTTP: 409 Conflict. Roll back this transaction."""


#: What there is of a key: the kind of the response, and its bytes in base64; None of a new one.
Kept: TypeAlias = tuple[str, str | None] | None


class RequestTable:
    def __init__(self, consumer: str, table: str) -> None:
        """``table`` is quoted."""
        self._consumer = consumer
        self._begin = _begin(table)
        self._read = _read(table)
        self._store = _store(table)

    def begin(self, key: str, body: bytes) -> Steps[Kept]:
        """None: it is the first. Raises IdempotencyKeyReused, InProgress; ValueError, TypeError for a key or body."""
        if not key or not is_storable(key, longest_bytes=_LONGEST_KEY_BYTES):
            raise ValueError("the idempotency key is empty, has a NUL in it, or has over 1,000 bytes")
        if not isinstance(body, bytes | bytearray | memoryview):
            raise TypeError(f"the request's body is a {type(body).__name__}: give the bytes that came")
        digest = hashlib.sha256(body).hexdigest()
        if (yield self._begin, self._parameter(key=key, hash=digest)):
            return None
        # a statement of its own: it sees what the one before has waited for
        rows = yield self._read, self._parameter(key=key)
        if not rows:  # it was pruned in this moment, or is not to be seen (REPEATABLE READ)
            raise InProgress(f"the request with idempotency key {key!r} cannot be read right now; try again")
        known, kind, content = rows[0]
        if known != digest:
            raise IdempotencyKeyReused(f"idempotency key {key!r} came before, with another body")
        if kind is None:
            raise InProgress(f"the request with idempotency key {key!r} was begun, and nothing was stored for it")
        return kind, content

    def store(self, key: str, response: Any) -> Steps[None]:
        """Raises TypeError for what is no bytes, text or JSON, ValueError for None, RuntimeError if it is too late."""
        if response is None:
            raise ValueError("None is no response: who asks again could not tell it from none")
        kind, content = stored_value(response)
        if not (yield self._store, self._parameter(key=key, kind=kind, response=content)):
            raise RuntimeError(f"the transaction in which idempotency key {key!r} was asked for is over")

    def _parameter(self, **values: Any) -> str:
        return json.dumps({"scope": self._consumer, **values}, ensure_ascii=False)


def replay_of(kept: Kept) -> Any:
    return None if kept is None else value_of(*kept)


_BEFORE: Final = "WITH given AS (SELECT CAST(CAST("
_AFTER: Final = " AS text) AS json) AS given)"


def _begin(table: str) -> Statement:
    """Waits for a session that has the key right now, as long as lock_timeout lets it."""
    return Statement(
        _BEFORE,
        f"""{_AFTER}
        INSERT INTO {table} (scope, key, request_hash)
        SELECT given ->> 'scope', given ->> 'key', given ->> 'hash' FROM given
        ON CONFLICT DO NOTHING RETURNING 1""",
        returns=True,
    )


def _read(table: str) -> Statement:
    return Statement(
        _BEFORE,
        f"""{_AFTER}
        SELECT request_hash, response_kind, encode(response, 'base64') FROM given, {table} AS known
         WHERE known.scope = given ->> 'scope' AND known.key = given ->> 'key'""",
        returns=True,
    )


def _store(table: str) -> Statement:
    return Statement(
        _BEFORE,
        f"""{_AFTER}
        UPDATE {table} AS known SET response_kind = given ->> 'kind', response = decode(given ->> 'response', 'base64')
          FROM given WHERE known.scope = given ->> 'scope' AND known.key = given ->> 'key'
        RETURNING 1""",
        returns=True,
    )
