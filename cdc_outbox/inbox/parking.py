"""Messages that are out of the way: one that a handler could not take, and behind it what follows of the same key.

Pure. A parked message is a row, written in one transaction with its id in the inbox; so its offset can be committed,
and nobody else waits. Its state:

    retry      will be tried again when it is due
    parked     has failed too often: waits until somebody says `unpark` or `discard`
    behind     follows one of the same key that is there; is tried when all before it are past
    handled, discarded      past; kept until they are pruned

A message's turn has come when it is the first of its key that is still open. When one is past, the next is woken in the
same transaction. One that is parked behind it in that moment, by another process, is found when nothing else is due.

A key is one within its topic, as Kafka orders them. A message without a key follows none, and is followed by none.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from cdc_outbox.inbox.attempts import DIED
from cdc_outbox.inbox.message import Message
from cdc_outbox.inbox.stored import message_of, stored_error, stored_message
from cdc_outbox.transactions import Statement, Steps

#: How long a message that is being retried is left to whoever has it, should that process have died.
LEASE: Final = timedelta(seconds=10)
_LONGEST_WAIT: Final = timedelta(minutes=1)
_OPEN: Final = "state IN ('parked', 'retry', 'behind')"
#: Of messages in one statement. The server needs some twenty times as much for it.
_PORTION_BYTES: Final = 4_000_000


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
        self._wake = _wake(table)
        self._retry = _retry(table)
        self._decide = _decide(table)
        self._find = _find(table)

    def park(self, messages: Sequence[Message], *, state: str, error: object = None, attempts: int = 1) -> Steps[None]:
        """Raises TypeError for a value that cannot be kept."""
        for some in _portions([{**stored_message(message), "lane": lane(message)} for message in messages]):
            yield self._park, self._parameter(state=state, attempts=attempts, messages=some, **_told(error))

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

    def due(self, attempts: int, topics: Sequence[str] | None) -> Steps[Message | None]:
        given = {"attempts": attempts, "lease": LEASE.total_seconds(), "died": DIED}
        parameter = self._parameter(**given, topics=None if topics is None else list(topics))
        for statement in (self._due, self._wake, self._due):
            rows = yield statement, parameter
            while rows and statement is self._due:
                row = json.loads(rows[0][0])
                if row["state"] == "retry":
                    return message_of(row)
                rows = yield statement, parameter  # that one was begun too often, and is parked now
            if statement is self._wake and not rows:
                return None
        return None

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


def _portions(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """In their order, each of some megabytes, or of one row."""
    some: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        size += len(row["value"] or "")
        if some and size > _PORTION_BYTES:
            yield some
            some, size = [], len(row["value"] or "")
        some.append(row)
    yield some


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
    error text, error_in_ascii text, lanes json, messages json, topics text[]))"""
_CONSUMER: Final = "(SELECT consumer FROM given)"
_OF_TOPICS: Final = "topic = ANY (coalesce((SELECT topics FROM given), ARRAY[topic]))"
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
    """Takes the first whose turn it is: counts the attempt, and keeps others from it while the lease runs."""
    return Statement(
        _BEFORE,
        f"""{_AFTER}, taken AS (
            SELECT consumer, source, message_id FROM {table} AS one
             WHERE consumer = {_CONSUMER} AND state = 'retry' AND due_at <= now() AND {_OF_TOPICS}
               AND NOT EXISTS (SELECT FROM {table} AS earlier
                                WHERE earlier.consumer = one.consumer AND earlier.lane = one.lane
                                  AND earlier.place < one.place AND earlier.{_OPEN})
             ORDER BY due_at, place LIMIT 1 FOR UPDATE SKIP LOCKED
        )
        UPDATE {table} AS known SET
               state = CASE WHEN known.attempts >= {_ATTEMPTS} THEN 'parked' ELSE 'retry' END,
               error = CASE WHEN known.attempts >= {_ATTEMPTS}
                            THEN coalesce(known.error, (SELECT died FROM given)) ELSE known.error END,
               attempts = CASE WHEN known.attempts >= {_ATTEMPTS} THEN known.attempts ELSE known.attempts + 1 END,
               due_at = now() + make_interval(secs => (SELECT lease FROM given)),
               changed_at = now()
          FROM taken WHERE {_is_same("known", "taken")}
        RETURNING CAST(json_build_object(
            'state', known.state, 'source', known.source, 'id', known.message_id, 'committed_at', known.committed_at,
            'topic', known.topic, 'partition', known.partition, 'offset', known."offset",
            'key', encode(known.key, 'base64'), 'value', encode(known.value, 'base64'),
            'details', known.details) AS text)""",
        returns=True,
    )


def _wake(table: str) -> Statement:
    """Those behind nothing: the one before was handled or discarded. From now on they are tried.

    From lane to lane by the index (a "loose index scan"), and only of lanes where something waits behind.
    """
    mine, parts = f"consumer = {_CONSUMER} AND state = 'behind'", "consumer, source, message_id, lane, place"
    return Statement(
        _BEFORE,
        f"""{_AFTER}, follower AS (
            (SELECT {parts} FROM {table} WHERE {mine} ORDER BY lane, place LIMIT 1)
            UNION ALL
            SELECT following.* FROM follower, LATERAL (
                SELECT {parts} FROM {table} AS one WHERE {mine} AND one.lane > follower.lane
                 ORDER BY lane, place LIMIT 1) AS following
        ), first AS (
            SELECT * FROM follower
             WHERE NOT EXISTS (SELECT FROM {table} AS earlier
                                WHERE earlier.consumer = follower.consumer AND earlier.lane = follower.lane
                                  AND earlier.place < follower.place AND earlier.{_OPEN})
             LIMIT 16  -- few, for the index
        )
        UPDATE {table} AS known SET state = 'retry', due_at = now() FROM first
         WHERE {_is_same("known", "first")} AND known.state = 'behind'
        RETURNING 1""",
        returns=True,
    )


def _retry(table: str) -> Statement:
    return Statement(
        _BEFORE,
        f"""{_AFTER}, done AS (
            UPDATE {table} AS known SET state = 'handled', changed_at = now() FROM given
             WHERE known.consumer = {_CONSUMER} AND known.source = given.source AND known.message_id = given.id
               AND known.state = 'retry'
            RETURNING known.consumer, known.lane, known.place
        ), {_next(table)} SELECT 1 FROM done""",
        returns=True,
    )


def _decide(table: str) -> Statement:
    return Statement(
        _BEFORE,
        f"""{_AFTER}, decided AS (
            UPDATE {table} AS known SET
                   state = given.state, attempts = CASE WHEN given.state = 'retry' THEN 0 ELSE known.attempts END,
                   due_at = now(), changed_at = now()
              FROM given
             WHERE known.consumer = {_CONSUMER} AND known.source = given.source AND known.message_id = given.id
               AND (known.state = 'parked' OR known.state = 'retry' AND given.state = 'discarded')
            RETURNING known.consumer, known.lane, known.place, known.state
        ), done AS (SELECT * FROM decided WHERE state = 'discarded'), {_next(table)} SELECT 1 FROM decided""",
        returns=True,
    )


def _next(table: str) -> str:
    """The first that waits behind what is ``done`` is tried now. One that comes in this moment is found by _wake."""
    return f"""next AS (
            UPDATE {table} AS follower SET state = 'retry', due_at = now() FROM done, LATERAL (
                SELECT consumer, source, message_id, state FROM {table} AS one
                 WHERE one.consumer = done.consumer AND one.lane = done.lane AND one.place > done.place AND one.{_OPEN}
                 ORDER BY lane, place LIMIT 1) AS first
             WHERE {_is_same("follower", "first")} AND first.state = 'behind'
        )"""


def _is_same(one: str, other: str) -> str:
    return " AND ".join(f"{one}.{column} = {other}.{column}" for column in ("consumer", "source", "message_id"))


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
