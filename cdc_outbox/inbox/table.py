"""The inbox's table: the statement that writes a message's id down, and reads from what it returns whether it was new.

Pure. The id is written in the transaction in which the message is handled. Another session that has the same message
waits for that transaction to end: if it commits, the message is a duplicate, if it rolls back, it is not.
"""

import json
from collections.abc import Iterable
from datetime import timedelta
from typing import Final

from cdc_outbox.inbox.attempts import AttemptTable
from cdc_outbox.inbox.message import Message, is_storable
from cdc_outbox.inbox.parking import ParkedTable
from cdc_outbox.inbox.requests import RequestTable
from cdc_outbox.inbox.versions import VersionTable
from cdc_outbox.transactions import Statement, Steps, parse_table, quoted, quoted_table

#: 8 kB each: some thousands of rows in a transaction, a fraction of a second.
_BLOCKS_AT_A_TIME: Final = 64
#: Of the tables beside it.
_ROWS_AT_A_TIME: Final = 2_000
_LONGEST_CONSUMER_BYTES: Final = 500
#: PostgreSQL cuts off what is longer.
_LONGEST_NAME_BYTES: Final = 63


class InboxTable:
    """Which table, and for which consumer. Every driver's ``Inbox`` is one.

    ``consumer`` is part of the key: each consumer handles each message once. Give it the name of what is done with the
    messages, which stays when deployment or consumer group change. ``table`` is named as in SQL.

    Raises ValueError for a consumer without a name, or a table that cannot be one.
    """

    def __init__(self, consumer: str, *, table: str = "public.inbox") -> None:
        if not is_storable(consumer, longest_bytes=_LONGEST_CONSUMER_BYTES) or not consumer:
            raise ValueError("an inbox needs the consumer's name, the same in every process that does the same work")
        self._consumer = consumer
        self._table = quoted_table(table)
        self._insert = _insert(self._table)
        self._parked = ParkedTable(consumer, beside(table, "parked"))
        self._attempts = AttemptTable(consumer, beside(table, "attempt"))
        self._versions = VersionTable(consumer, beside(table, "version"))
        self._requests = RequestTable(consumer, beside(table, "request"))
        #: of an ``event`` in the inbox: it is not old while its message waits, or was handled lately
        self._is_parked = (
            f"EXISTS (SELECT FROM {beside(table, 'parked')} AS parked WHERE parked.consumer = event.consumer"
            " AND parked.source = event.source AND parked.message_id = event.message_id)"
        )
        self._forget = [
            _forget(beside(table, "parked"), "consumer", "AND state IN ('handled', 'discarded')"),
            _forget(beside(table, "attempt"), "consumer"),
            _forget(beside(table, "request"), "scope"),
        ]

    def _fresh(self, given: Iterable[Message]) -> Steps[list[Message]]:
        """Those that were not there before, in the order given; of copies among them the first."""
        messages = list(given)
        if not messages:
            return []
        keys = [
            [message.source, message.id, message.committed_at and message.committed_at.isoformat()]
            for message in messages
        ]
        parameter = json.dumps({"consumer": self._consumer, "messages": keys}, ensure_ascii=False)
        return [messages[place - 1] for (place,) in (yield self._insert, parameter)]

    def _park(self, message: Message, error: object, attempts: int) -> Steps[None]:
        """Raises TypeError for a value that cannot be kept."""
        if (yield from self._fresh([message])):
            yield from self._parked.park([message], state="retry", error=error, attempts=attempts)
        else:
            yield from self._parked.fail(message, error=error, attempts=attempts)

    def _pruning(self, older_than: timedelta) -> Steps[int]:
        """Statements that drop past partitions and delete old rows a few blocks at a time; returns how many rows.

        Raises ValueError.
        """
        if older_than < timedelta():
            raise ValueError(f"older_than is {older_than}: nothing was processed in the future")
        age = {"consumer": self._consumer, "seconds": older_than.total_seconds()}
        parameter = json.dumps(age, ensure_ascii=False)
        deleted = 0
        for forget in self._forget:
            count = _ROWS_AT_A_TIME
            while count == _ROWS_AT_A_TIME:
                ((count,),) = yield forget, parameter
                deleted += count
        for (partition,) in (yield _find_past_partitions(self._table), parameter):
            yield _drop(partition, self._consumer, older_than.total_seconds(), self._is_parked), None
        for table, block in (yield _find_old(self._table, self._is_parked), parameter):
            here = {**age, "first": block, "end": block + _BLOCKS_AT_A_TIME}
            ((count,),) = yield _delete(table, self._is_parked), json.dumps(here, ensure_ascii=False)
            deleted += count
        return deleted


def beside(table: str, name: str) -> str:
    """A table that belongs to the inbox, quoted: ``"app"."inbox_parked"``. Raises ValueError."""
    schema, inbox = parse_table(table)
    if len(f"{inbox}_{name}".encode()) > _LONGEST_NAME_BYTES:
        raise ValueError(f"table name {inbox!r} is too long: others are named after it, with _{name} at the end")
    return f"{quoted(schema)}.{quoted(f'{inbox}_{name}')}"


def _insert(table: str) -> Statement:
    """Writes what is not there, and returns its places in the list that was given.

    Not caught as an error: the transaction would be lost, and an error's text is translated. Sorted: two sessions that
    write the same messages in different orders would wait for each other. Places and not ids are returned: there are
    drivers that give text back as bytes.
    """
    return Statement(
        "WITH given AS MATERIALIZED (SELECT * FROM json_to_record(CAST(CAST(",
        f""" AS text) AS json)) AS given (consumer text, messages json)), message AS (
            SELECT consumer, entry ->> 0 AS source, entry ->> 1 AS message_id,
                   CAST(entry ->> 2 AS timestamptz) AS committed_at, place
              FROM given, json_array_elements(messages) WITH ORDINALITY AS one (entry, place)
        ), written AS (
            INSERT INTO {table} (consumer, source, message_id, committed_at)
            SELECT consumer, source, message_id, committed_at FROM message ORDER BY consumer, source, message_id, place
            ON CONFLICT DO NOTHING RETURNING source, message_id
        )
        SELECT CAST(min(place) AS integer) FROM message JOIN written USING (source, message_id)
         GROUP BY source, message_id ORDER BY 1""",
        returns=True,
    )


#: SQL around the parameter of everything that prunes.
_AGE: Final = (
    "WITH age AS MATERIALIZED (SELECT * FROM json_to_record(CAST(CAST(",
    ' AS text) AS json)) AS age (consumer text, seconds float, first bigint, "end" bigint))',
)
#: Subqueries, because an index can be used with those.
_IS_OLD: Final = (
    "event.consumer = (SELECT consumer FROM age)"
    " AND event.processed_at < now() - make_interval(secs => (SELECT seconds FROM age))"
)


def _find_past_partitions(table: str) -> Statement:
    """Into which nothing belongs that was committed lately. Never the default one, and none of a plain table."""
    return Statement(
        _AGE[0],
        f"""{_AGE[1]}
        SELECT quote_ident(nspname) || '.' || quote_ident(relname)
          FROM pg_inherits JOIN pg_class AS part ON part.oid = inhrelid
          JOIN pg_namespace AS n ON n.oid = relnamespace
         WHERE inhparent = CAST('{table.replace("'", "''")}' AS regclass) AND relkind = 'r' AND NOT inhdetachpending
           -- of one column, so FOR VALUES FROM (...) TO ('2026-01-01'), or TO (MAXVALUE)
           AND CAST(substring(pg_get_expr(relpartbound, part.oid) FROM 'TO \\(''(.*)''\\)') AS timestamptz)
               <= now() - make_interval(secs => (SELECT seconds FROM age))
         ORDER BY 1""",
        returns=True,
    )


def _drop(partition: str, consumer: str, seconds: float, is_parked: str = "false") -> Statement:
    """Drops it if it holds nothing but old rows of this consumer, and locks are free soon. Else its rows are deleted.

    What came after the first look was processed just now. So the second one, at what nobody can change any more, looks
    for fresh rows only, which the index on processed_at finds at once.
    """
    name = f"convert_from(decode('{consumer.encode().hex()}', 'hex'), 'UTF8')"
    is_fresh = f"processed_at >= now() - make_interval(secs => {seconds})"
    tag = "$drop$"
    while tag in partition:
        tag = f"$_{tag[1:]}"
    return Statement(
        f"""DO {tag} BEGIN
            IF EXISTS (SELECT FROM ONLY {partition} AS event WHERE {is_fresh} OR consumer <> {name} OR {is_parked}) THEN
                RETURN;
            END IF;
            SET LOCAL enable_seqscan = off;
            SET LOCAL lock_timeout = '50ms';
            LOCK TABLE ONLY {partition} IN SHARE ROW EXCLUSIVE MODE;
            IF NOT EXISTS (SELECT FROM ONLY {partition} WHERE {is_fresh}) THEN DROP TABLE {partition}; END IF;
        EXCEPTION WHEN lock_not_available OR deadlock_detected OR undefined_table THEN NULL;
        END {tag}"""
    )


def _find_old(table: str, is_parked: str) -> Statement:
    """Where old rows are: table or partition, and the first block of a group."""
    return Statement(
        _AGE[0],
        f"""{_AGE[1]}, place AS (
            SELECT DISTINCT event.tableoid AS heap,
                   CAST((CAST(CAST(event.ctid AS text) AS point))[0] AS bigint) / {_BLOCKS_AT_A_TIME}
                       * {_BLOCKS_AT_A_TIME} AS block
              FROM {table} AS event WHERE {_IS_OLD} AND NOT {is_parked}
        )
        SELECT quote_ident(nspname) || '.' || quote_ident(relname), block
          FROM place JOIN pg_class ON pg_class.oid = heap JOIN pg_namespace AS n ON n.oid = relnamespace
         ORDER BY heap, block""",
        returns=True,
    )


def _delete(table: str, is_parked: str) -> Statement:
    """How many it deleted. What is locked is passed over: another cleaner has it."""
    return Statement(
        _AGE[0],
        f"""{_AGE[1]}, old AS (
            SELECT event.ctid AS place FROM ONLY {table} AS event
             WHERE event.ctid >= (SELECT CAST('(' || first || ',0)' AS tid) FROM age)
               AND event.ctid < (SELECT CAST('(' || "end" || ',0)' AS tid) FROM age) AND {_IS_OLD}
               AND NOT {is_parked} FOR UPDATE SKIP LOCKED
        ), gone AS (DELETE FROM ONLY {table} AS event USING old WHERE event.ctid = old.place RETURNING 1)
        SELECT count(*) FROM gone""",
        returns=True,
    )


def _forget(table: str, owner: str, condition: str = "") -> Statement:
    """How many old rows it deleted, of a table beside the inbox. What is locked is passed over."""
    return Statement(
        _AGE[0],
        f"""{_AGE[1]}, old AS (
            SELECT event.ctid AS place FROM {table} AS event
             WHERE event.{owner} = (SELECT consumer FROM age) {condition}
               AND event.changed_at < now() - make_interval(secs => (SELECT seconds FROM age))
             LIMIT {_ROWS_AT_A_TIME} FOR UPDATE SKIP LOCKED
        ), gone AS (DELETE FROM {table} AS event USING old WHERE event.ctid = old.place RETURNING 1)
        SELECT count(*) FROM gone""",
        returns=True,
    )
