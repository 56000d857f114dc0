"""The writer: an application under test load, which records what became of every transaction it tried.

Several connections write at once. Each event takes the next version of its aggregate in its own transaction, under the
aggregate's row lock, as applications with versioned aggregates do: so versions are dense, and their order is the order
of commits, whichever connection wrote them.
"""

import json
import random
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg

Connection = psycopg.Connection[tuple[Any, ...]]

_SCHEMA: Final = "CREATE TABLE aggregate (id text PRIMARY KEY, version bigint NOT NULL DEFAULT 0)"
_AGGREGATES: Final = 40
#: where no limit of a topic lets it through; it does not compress
_POISON_BYTES: Final = 24_000


@dataclass(frozen=True, slots=True)
class Event:
    id: str
    aggregate_type: str
    aggregate_id: str
    version: int


@dataclass(slots=True)
class Ledger:
    """Events by outcome. Ambiguous: the connection broke during COMMIT; `Writer.stop` settles them by looking."""

    committed: list[Event] = field(default_factory=list)
    rolled_back: list[Event] = field(default_factory=list)
    ambiguous: list[list[Event]] = field(default_factory=list)
    poison: set[str] = field(default_factory=set)
    ambiguous_count: int = 0


class Writer:
    """``events_per_second`` in all, or as fast as it goes; ``poison_share`` of the events are too large for Kafka."""

    def __init__(
        self,
        dsn: str,
        aggregate_types: list[str],
        *,
        seed: int = 0,
        events_per_second: float | None = 500,
        connections: int = 3,
        poison_share: float = 0.0,
    ) -> None:
        self._dsn = dsn
        self._types = aggregate_types
        self._seconds_per_event = connections / events_per_second if events_per_second else 0.0
        self._poison_share = poison_share
        self._stopping = threading.Event()
        self.ledger = Ledger()
        with psycopg.connect(dsn, autocommit=True) as connection:
            if connection.execute("SELECT to_regclass('aggregate')").fetchone() == (None,):
                connection.execute(_SCHEMA)
            with connection.cursor() as cursor:
                for aggregate_type in aggregate_types:
                    ids = [(f"{aggregate_type}/a-{number}",) for number in range(_AGGREGATES)]
                    cursor.executemany("INSERT INTO aggregate (id) VALUES (%s) ON CONFLICT DO NOTHING", ids)
        self._threads = [
            threading.Thread(target=self._write, args=[random.Random(seed * 100 + number)])
            for number in range(connections)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> Ledger:
        """End all transactions at hand, find out what became of the ambiguous ones."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        if self.ledger.ambiguous:
            with psycopg.connect(self._dsn) as connection:
                for events in self.ledger.ambiguous:
                    row = connection.execute("SELECT FROM outbox WHERE id = %s", [events[0].id])
                    (self.ledger.committed if row.rowcount else self.ledger.rolled_back).extend(events)
        self.ledger.ambiguous_count += len(self.ledger.ambiguous)
        self.ledger.ambiguous.clear()
        return self.ledger

    def _write(self, rng: random.Random) -> None:
        while not self._stopping.is_set():
            try:
                with psycopg.connect(self._dsn) as connection:
                    while not self._stopping.is_set():
                        began = time.monotonic()
                        count = self._transaction(connection, rng)
                        rest = began + count * self._seconds_per_event - time.monotonic()
                        if rest > 0:
                            self._stopping.wait(min(rest, 2.0))
            except psycopg.Error:
                self._stopping.wait(0.1)

    def _transaction(self, connection: Connection, rng: random.Random) -> int:
        """One transaction of a random shape and end; how many events it tried."""
        kept: list[Event] = []
        undone: list[Event] = []
        try:
            self._fill(connection, rng, kept, undone)
            if rng.random() < 0.08:
                connection.rollback()
                undone += kept
                kept = []
        except psycopg.Error:
            self.ledger.rolled_back.extend(kept + undone)
            raise
        self.ledger.rolled_back.extend(undone)
        try:
            connection.commit()
        except psycopg.Error:
            if kept:
                self.ledger.ambiguous.append(kept)
            raise
        self.ledger.committed.extend(kept)
        return len(kept) + len(undone)

    def _fill(self, connection: Connection, rng: random.Random, kept: list[Event], undone: list[Event]) -> None:
        shape = rng.choices(["one", "few", "many", "copy", "savepoints"], [55, 25, 3, 7, 10])[0]
        size = {"one": 1, "few": rng.randint(2, 20), "many": rng.randint(200, 2000), "copy": rng.randint(20, 300)}
        if shape != "savepoints":
            kept += self._events(connection, rng, size[shape], copy=shape in ("many", "copy"))
            return
        connection.execute("SELECT")  # the transaction begins here: else the first savepoint would be one
        for _ in range(rng.randint(1, 4)):
            roll_back = rng.random() < 0.4
            with suppress(psycopg.Rollback), connection.transaction(force_rollback=roll_back):
                target = undone if roll_back else kept
                target += self._events(connection, rng, rng.randint(1, 5))

    def _events(self, connection: Connection, rng: random.Random, count: int, *, copy: bool = False) -> list[Event]:
        aggregate_type = rng.choice(self._types)
        aggregates = sorted({f"a-{rng.randrange(_AGGREGATES)}" for _ in range(min(count, 5))})
        shares = [count // len(aggregates) + (number < count % len(aggregates)) for number in range(len(aggregates))]
        events: list[Event] = []
        for aggregate_id, share in zip(aggregates, shares, strict=True):
            if not share:
                continue
            row = connection.execute(
                "UPDATE aggregate SET version = version + %s WHERE id = %s RETURNING version",
                [share, f"{aggregate_type}/{aggregate_id}"],
            ).fetchone()
            assert row
            events += [
                Event(str(uuid.UUID(int=rng.getrandbits(128))), aggregate_type, aggregate_id, version)
                for version in range(row[0] - share + 1, row[0] + 1)
            ]
        rows = list(self._rows(events, rng))
        columns = "outbox (id, aggregate_type, aggregate_id, event_type, payload)"
        with connection.cursor() as cursor:
            if copy:
                with cursor.copy(f"COPY {columns} FROM STDIN".encode()) as target:
                    for values in rows:
                        target.write_row(values)
            else:
                cursor.executemany(f"INSERT INTO {columns} VALUES (%s, %s, %s, 'Tested', %s)".encode(), rows)
        return events

    def _rows(self, events: list[Event], rng: random.Random) -> Iterator[tuple[str, ...]]:
        for event in events:
            if rng.random() < self._poison_share:
                self.ledger.poison.add(event.id)
                filler = rng.randbytes(_POISON_BYTES // 2).hex()
            else:
                filler = "x" * rng.choice((20, 200, 200, 200, 2000))
            payload = json.dumps({"version": event.version, "filler": filler})
            yield (event.id, event.aggregate_type, event.aggregate_id, payload)
