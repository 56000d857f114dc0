"""Messages that are out of the way: one that a handler could not take, and behind it what follows of the same key.

Pure. A parked message is a row, written in one transaction with its id in the inbox; so its offset can be committed,
and nobody else waits. Its state:

    retry      will be tried again when it is due
    parked     has failed too often: waits until somebody says `unpark` or `discard`
    behind     follows one of the same key that is there; is tried when all before it are gone
    handled, discarded      past; kept until they are pruned

Whether a message's turn has come is never written down. It is asked each time: it is the first of its key that is still
open. So there is no moment at which a crash, or two processes at once, could leave one behind nothing.

A key is one within its topic, as Kafka orders them. A message without a key follows none, and is followed by none.
"""

import hashlib
import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from cdc_outbox.inbox.message import Message
from cdc_outbox.inbox.stored import message_of, stored_error, stored_message
from cdc_outbox.transactions import Statement, Steps

#: How long a message that is being retried is left to whoever has it, should that process have died.
LEASE: Final = timedelta(seconds=10)
_LONGEST_WAIT: Final = timedelta(minutes=1)
_OPEN: Final = "state IN ('parked', 'retry', 'behind')"
_DIED: Final = "the process ended while it was handling this, each time"


class NotParked(LookupError):
    """There is no such message to be unparked or discarded."""


def lane(message: Message) -> str | None:
    """What Kafka keeps in order, as a UUID: a topic and a key, however long. None without a key."""
    if message.key is None:
        return None
    name = f"{message.topic}\0{message.key}".encode(errors="surrogatepass")
    return str(UUID(bytes=hashlib.sha256(name).digest()[:16]))


class ParkedTable:
    def __init__(self, consumer: str, table: str) -> None:
        """``table`` is quoted."""
        self._consumer = consumer
        self._park = _park(table)
        self._fail = _fail(table)
        self._followers = _followers(table)
        self._due = _due(table)
        self._retry = _retry(table)
        self._decide = _decide(table)
        self._find = _find(table)

    def park(self, messages: Sequence[Message], *, state: str, error: object = None, attempts: int = 1) -> Steps[None]:
        """Raises TypeError for a value that cannot be kept."""
        rows = [{**stored_message(message), "lane": lane(message)} for message in messages]
        yield self._park, self._parameter(state=state, attempts=attempts, messages=rows, **_told(error))

    def fail(self, message: Message, *, error: object, attempts: int) -> Steps[None]:
        yield (
            self._fail,
            self._parameter(source=message.source, id=message.id, attempts=attempts, **_told(error)),
        )

    def park_followers(self, messages: Sequence[Message]) -> Steps[list[Message]]:
        """Those that follow none are returned."""
        lanes = [lane(message) for message in messages]
        rows = yield self._followers, self._parameter(lanes=sorted({known for known in lanes if known}))
        blocked = {known for (known,) in rows}
        followers = [message for message, known in zip(messages, lanes, strict=True) if known in blocked]
        if followers:
            yield from self.park(followers, state="behind")
        return [message for message, known in zip(messages, lanes, strict=True) if known not in blocked]

    def due(self, attempts: int) -> Steps[Message | None]:
        while True:
            parameter = self._parameter(attempts=attempts, lease=LEASE.total_seconds(), died=_DIED)
            rows = yield self._due, parameter
            if not rows:
                return None
            row = json.loads(rows[0][0])
            if row["state"] == "retry":
                return message_of(row)

    def retry(self, message: Message) -> Steps[bool]:
        rows = yield self._retry, self._parameter(source=message.source, id=message.id)
        return bool(rows)

    def decide(self, message_id: str, source: str, state: str) -> Steps[None]:
        """Raises NotParked."""
        parameter = self._parameter(id=message_id, source=source, state=state)
        if (yield self._decide, parameter):
            return
        rows = yield self._find, parameter
        raise NotParked(f"message {message_id!r} {_why_not(rows[0] if rows else None, self._consumer)}")

    def _parameter(self, **values: Any) -> str:
        return json.dumps({"consumer": self._consumer, **values}, ensure_ascii=False)


def _told(error: object) -> dict[str, str]:
    return {} if error is None else stored_error(error)


def _why_not(row: tuple[Any, ...] | None, consumer: str) -> str:
    if row is None:
        return f"of consumer {consumer!r} is not parked; `cdc-outbox inbox list` shows what is"
    state, first = row
    if state == "behind":
        return f"waits behind {first!r}, which has the same key: decide about that one"
    if state == "retry":
        return "is about to be tried again already"
    return f"was {state} already"


#: SQL around the parameter. Materialized: as a constant it would be read again for each row.
_BEFORE: Final = "WITH RECURSIVE given AS MATERIALIZED (SELECT * FROM json_to_record(CAST(CAST("
_AFTER: Final = """ AS text) AS json)) AS given (
    consumer text, source text, id text, state text, attempts integer, lease float, died text,
    error text, error_in_ascii text, lanes json, messages json))"""
_CONSUMER: Final = "(SELECT consumer FROM given)"
_ATTEMPTS: Final = "(SELECT attempts FROM given)"
_ERROR: Final = """CASE WHEN getdatabaseencoding() = 'UTF8' THEN convert_from(decode(given.error, 'base64'), 'UTF8')
                        ELSE given.error_in_ascii END"""


def _wait(attempts: str) -> str:
    """From a tenth of a second on, doubled with each attempt."""
    longest = _LONGEST_WAIT.total_seconds()
    return f"make_interval(secs => least({longest}, 0.1 * power(2, least({attempts} - 1, 30))))"


def _park(table: str) -> Statement:
    """One that is open already stays as it is; one that is past, and comes again because its id was pruned, is new."""
    columns = 'consumer, source, message_id, committed_at, lane, topic, partition, "offset", key, value, details, error'
    return Statement(
        _BEFORE,
        f"""{_AFTER}, message AS (
            SELECT given.consumer, one.source, one.id AS message_id, committed_at, lane, topic, partition, "offset",
                   decode(key, 'base64') AS key, decode(value, 'base64') AS value, CAST(details AS json) AS details,
                   {_ERROR} AS error, CASE WHEN given.state = 'behind' THEN 0 ELSE 1 END AS attempts,
                   given.state, given.attempts AS most, place
              FROM given, ROWS FROM (json_to_recordset(messages) AS (
                   source text, id text, committed_at timestamptz, lane uuid, topic text, partition integer,
                   "offset" bigint, key text, value text, details text)) WITH ORDINALITY
                   AS one (source, id, committed_at, lane, topic, partition, "offset", key, value, details, place)
        )
        INSERT INTO {table} AS known ({columns}, attempts, state, due_at)
        SELECT {columns}, attempts, CASE WHEN state = 'retry' AND attempts >= most THEN 'parked' ELSE state END,
               now() + CASE WHEN state = 'retry' THEN {_wait("attempts")} ELSE interval '0' END
          FROM message ORDER BY place
        ON CONFLICT (consumer, source, message_id) DO UPDATE SET
               place = EXCLUDED.place, attempts = EXCLUDED.attempts, state = EXCLUDED.state, due_at = EXCLUDED.due_at,
               error = EXCLUDED.error, parked_at = now(), changed_at = now(), lane = EXCLUDED.lane,
               topic = EXCLUDED.topic, partition = EXCLUDED.partition, "offset" = EXCLUDED."offset",
               key = EXCLUDED.key, value = EXCLUDED.value, details = EXCLUDED.details
         WHERE NOT known.{_OPEN}""",
    )


def _fail(table: str) -> Statement:
    """Of one that was taken to be tried again, and failed. Its attempts were counted when it was taken."""
    return Statement(
        _BEFORE,
        f"""{_AFTER}
        UPDATE {table} AS known SET
               state = CASE WHEN known.attempts >= {_ATTEMPTS} THEN 'parked' ELSE 'retry' END,
               due_at = now() + {_wait("known.attempts")}, changed_at = now(), error = {_ERROR}
          FROM given
         WHERE known.consumer = {_CONSUMER} AND known.source = given.source
           AND known.message_id = given.id AND known.state = 'retry'""",
    )


def _followers(table: str) -> Statement:
    """Which of the keys given have a message there that is open."""
    return Statement(
        _BEFORE,
        f"""{_AFTER}
        SELECT asked FROM given, json_array_elements_text(given.lanes) AS asked
         WHERE EXISTS (SELECT FROM {table} WHERE consumer = {_CONSUMER} AND {_OPEN} AND lane = CAST(asked AS uuid))""",
        returns=True,
    )


def _due(table: str) -> Statement:
    """Takes the first whose turn it is: counts the attempt, and keeps others from it while the lease runs.

    From key to key by the index (a "loose index scan"): however many wait behind one, they are not read.
    """
    parts, mine = "lane, place, state, due_at", f"consumer = {_CONSUMER} AND {_OPEN}"
    ready = "state IN ('retry', 'behind') AND due_at <= now()"
    return Statement(
        _BEFORE,
        f"""{_AFTER}, head AS (
            (SELECT {parts} FROM {table} WHERE {mine} AND lane IS NOT NULL ORDER BY lane, place LIMIT 1)
            UNION ALL
            SELECT following.* FROM head, LATERAL (
                SELECT {parts} FROM {table} AS one WHERE {mine} AND one.lane > head.lane
                 ORDER BY lane, place LIMIT 1) AS following
        ), alone AS (SELECT {parts} FROM {table} WHERE {mine} AND lane IS NULL),
        taken AS (
            SELECT place FROM {table} AS one
             WHERE {ready} AND place = ANY (ARRAY(  -- an array, for the index
                       SELECT place FROM head WHERE {ready} UNION ALL SELECT place FROM alone WHERE {ready}))
             ORDER BY place LIMIT 1 FOR UPDATE SKIP LOCKED
        )
        UPDATE {table} AS known SET
               state = CASE WHEN known.attempts >= {_ATTEMPTS} THEN 'parked' ELSE 'retry' END,
               error = CASE WHEN known.attempts >= {_ATTEMPTS}
                            THEN coalesce(known.error, (SELECT died FROM given)) ELSE known.error END,
               attempts = CASE WHEN known.attempts >= {_ATTEMPTS} THEN known.attempts ELSE known.attempts + 1 END,
               due_at = now() + make_interval(secs => (SELECT lease FROM given)),
               changed_at = now()
          FROM taken WHERE known.place = taken.place
        RETURNING CAST(json_build_object(
            'state', known.state, 'source', known.source, 'id', known.message_id, 'committed_at', known.committed_at,
            'topic', known.topic, 'partition', known.partition, 'offset', known."offset",
            'key', encode(known.key, 'base64'), 'value', encode(known.value, 'base64'),
            'details', known.details) AS text)""",
        returns=True,
    )


def _retry(table: str) -> Statement:
    return Statement(
        _BEFORE,
        f"""{_AFTER}
        UPDATE {table} SET state = 'handled', changed_at = now()
         WHERE consumer = {_CONSUMER} AND source = (SELECT given.source FROM given)
           AND message_id = (SELECT given.id FROM given) AND state = 'retry'
        RETURNING 1""",
        returns=True,
    )


def _decide(table: str) -> Statement:
    return Statement(
        _BEFORE,
        f"""{_AFTER}
        UPDATE {table} AS known SET
               state = given.state, attempts = CASE WHEN given.state = 'retry' THEN 0 ELSE known.attempts END,
               due_at = now(), changed_at = now()
          FROM given
         WHERE known.consumer = {_CONSUMER} AND known.source = given.source AND known.message_id = given.id
           AND known.state = 'parked'
        RETURNING 1""",
        returns=True,
    )


def _find(table: str) -> Statement:
    """Its state, and the id of the first of its key."""
    return Statement(
        _BEFORE,
        f"""{_AFTER}
        SELECT state, (SELECT message_id FROM {table} AS first
                        WHERE first.consumer = one.consumer AND first.lane = one.lane AND first.{_OPEN}
                        ORDER BY place LIMIT 1)
          FROM {table} AS one
         WHERE consumer = {_CONSUMER} AND source = (SELECT given.source FROM given)
           AND message_id = (SELECT given.id FROM given)""",
        returns=True,
    )
