"""The inbox's table: the statement that writes a message's id down, and reads from what it returns whether it was new.

Pure. The id is written in the transaction in which the message is handled. Another session that has the same message
waits for that transaction to end: if it commits, the message is a duplicate, if it rolls back, it is not.
"""

import json
from collections.abc import Iterable
from datetime import timedelta
from typing import Final

from cdc_outbox.inbox.message import Message
from cdc_outbox.transactions import Rows, Statement, Steps, quoted_table

#: 8 kB each: some thousands of rows in a transaction, a fraction of a second.
_BLOCKS_AT_A_TIME: Final = 64


class InboxTable:
    """Which table, and for which consumer. Every driver's ``Inbox`` is one.

    ``consumer`` is part of the key: each consumer handles each message once. Give it the name of what is done with the
    messages, which stays when deployment or consumer group change. ``table`` is named as in SQL.

    Raises ValueError for a consumer without a name, or a table that cannot be one.
    """

    def __init__(self, consumer: str, *, table: str = "public.inbox") -> None:
        if not consumer or "\0" in consumer:
            raise ValueError("an inbox needs the consumer's name, the same in every process that does the same work")
        self._consumer = consumer
        self._table = quoted_table(table)
        # Sorted: two sessions that write the same messages in different orders would wait for each other.
        # Not caught as an error: the transaction would be lost, and its text is translated.
        self.note: Final = Statement(
            f"INSERT INTO {self._table} (consumer, source, message_id, committed_at)"
            " SELECT consumer, source, message_id, committed_at FROM json_to_recordset(CAST(CAST(",
            " AS text) AS json)) AS message (consumer text, source text, message_id text, committed_at timestamptz)"
            " ORDER BY consumer, source, message_id ON CONFLICT DO NOTHING RETURNING source, message_id",
            returns=True,
        )

    def keys(self, messages: Iterable[Message]) -> str:
        """The parameter of ``note``."""
        return json.dumps(
            [
                {
                    "consumer": self._consumer,
                    "source": message.source,
                    "message_id": message.id,
                    "committed_at": message.committed_at.isoformat(),
                }
                for message in messages
            ]
        )

    def fresh(self, messages: Iterable[Message], noted: Rows) -> list[Message]:
        """Those that were not there before, in the order given; of copies among them the first."""
        new = {(source, message_id) for source, message_id in noted}
        fresh: list[Message] = []
        for message in messages:
            if (message.source, message.id) in new:
                new.remove((message.source, message.id))
                fresh.append(message)
        return fresh

    def pruning(self, older_than: timedelta) -> Steps:
        """Statements that drop past partitions and delete old rows a few blocks at a time; returns how many rows.

        Raises ValueError.
        """
        if older_than < timedelta():
            raise ValueError(f"older_than is {older_than}: nothing was processed in the future")
        seconds = older_than.total_seconds()
        age = json.dumps({"consumer": self._consumer, "seconds": seconds})
        for (partition,) in (yield _find_past_partitions(self._table), age) or []:
            yield _drop(partition, self._consumer, seconds), None
        places = yield _find_old(self._table), age
        deleted = 0
        for table, block in places or []:
            ((count,),) = (yield _delete(table, block), age) or [(0,)]
            deleted += count
        return deleted


#: SQL around the parameter of everything that prunes.
_AGE: Final = (
    "WITH age AS MATERIALIZED (SELECT * FROM json_to_record(CAST(CAST(",
    " AS text) AS json)) AS age (consumer text, seconds float))",
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
        SELECT format('%I.%I', nspname, relname)
          FROM pg_inherits JOIN pg_class AS part ON part.oid = inhrelid
          JOIN pg_namespace AS n ON n.oid = relnamespace
         WHERE inhparent = CAST('{table.replace("'", "''")}' AS regclass) AND relkind = 'r' AND NOT inhdetachpending
           -- of one column, so FOR VALUES FROM (...) TO ('2026-01-01'), or TO (MAXVALUE)
           AND CAST(substring(pg_get_expr(relpartbound, part.oid) FROM 'TO \\(''(.*)''\\)') AS timestamptz)
               <= now() - make_interval(secs => (SELECT seconds FROM age))
         ORDER BY 1""",
        returns=True,
    )


def _drop(partition: str, consumer: str, seconds: float) -> Statement:
    """Drops it if it holds nothing but old rows of this consumer, and nobody is in the way: else another time.

    Whoever inserts waits for us no longer than we for them. The second look is at what nobody can change any more.
    """
    name = f"convert_from(decode('{consumer.encode().hex()}', 'hex'), 'UTF8')"
    kept = f"processed_at >= now() - make_interval(secs => {seconds}) OR consumer <> {name}"
    return Statement(
        f"""DO $drop$ BEGIN
            IF EXISTS (SELECT FROM ONLY {partition} WHERE {kept}) THEN RETURN; END IF;
            SET LOCAL lock_timeout = '50ms';
            LOCK TABLE ONLY {partition} IN SHARE ROW EXCLUSIVE MODE;
            IF NOT EXISTS (SELECT FROM ONLY {partition} WHERE {kept}) THEN DROP TABLE {partition}; END IF;
        EXCEPTION WHEN lock_not_available OR undefined_table THEN NULL;
        END $drop$"""
    )


def _find_old(table: str) -> Statement:
    """Where old rows are: table or partition, and the first block of a group."""
    return Statement(
        _AGE[0],
        f"""{_AGE[1]}, place AS (
            SELECT DISTINCT event.tableoid AS heap,
                   CAST((CAST(CAST(event.ctid AS text) AS point))[0] AS bigint) / {_BLOCKS_AT_A_TIME}
                       * {_BLOCKS_AT_A_TIME} AS block
              FROM {table} AS event WHERE {_IS_OLD}
        )
        SELECT format('%I.%I', nspname, relname), block
          FROM place JOIN pg_class ON pg_class.oid = heap JOIN pg_namespace AS n ON n.oid = relnamespace
         ORDER BY heap, block""",
        returns=True,
    )


def _delete(table: str, block: int) -> Statement:
    """How many it deleted. What is locked is passed over: another cleaner has it."""
    return Statement(
        _AGE[0],
        f"""{_AGE[1]}, old AS (
            SELECT event.ctid AS place FROM ONLY {table} AS event
             WHERE event.ctid >= CAST('({block},0)' AS tid)
               AND event.ctid < CAST('({block + _BLOCKS_AT_A_TIME},0)' AS tid) AND {_IS_OLD}
               FOR UPDATE SKIP LOCKED
        ), gone AS (DELETE FROM ONLY {table} AS event USING old WHERE event.ctid = old.place RETURNING 1)
        SELECT count(*) FROM gone""",
        returns=True,
    )
