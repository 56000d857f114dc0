"""The polling relay that everyone writes first: SELECT ... FOR UPDATE SKIP LOCKED, publish, flush, mark as processed.

`python -m benchmarks.peers.poller` is its process; what it is told is in the environment.
"""

import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from typing import Final

import psycopg
from confluent_kafka import Producer

from benchmarks.lane import Lane
from benchmarks.peers.process import running

_BATCH: Final = 1000
_SLEEP_SECONDS: Final = 0.1


class Poller:
    name = "polling relay"
    uses_slot = False
    publishes = True

    def prepare(self, lane: Lane) -> None:
        lane.db.execute("ALTER TABLE outbox ADD COLUMN place bigserial, ADD COLUMN processed_at timestamptz")
        lane.db.execute("CREATE INDEX ON outbox (place) WHERE processed_at IS NULL")

    def start(self, lane: Lane) -> AbstractContextManager[subprocess.Popen[bytes]]:
        settings = {"POLLER_DSN": lane.dsn, "POLLER_KAFKA": lane.arena.bootstrap_servers}
        return running([sys.executable, "-m", "benchmarks.peers.poller"], settings)

    def has_finished(self, lane: Lane, process: subprocess.Popen[bytes], events: int) -> bool:
        return lane.db.execute("SELECT FROM outbox WHERE processed_at IS NULL LIMIT 1").rowcount == 0


def main() -> None:
    producer = Producer(
        {
            "bootstrap.servers": os.environ["POLLER_KAFKA"],
            "acks": "all",
            "enable.idempotence": True,
            "compression.type": "lz4",
            "linger.ms": 5,
        }
    )
    with psycopg.connect(os.environ["POLLER_DSN"]) as connection:
        while True:
            rows = connection.execute(
                "SELECT id::text, aggregate_type, aggregate_id, event_type, payload::text FROM outbox"
                " WHERE processed_at IS NULL ORDER BY place LIMIT %s FOR UPDATE SKIP LOCKED",
                [_BATCH],
            ).fetchall()
            for event_id, aggregate_type, aggregate_id, event_type, payload in rows:
                headers = [("id", event_id), ("type", event_type)]
                producer.produce(f"outbox.{aggregate_type}", payload, aggregate_id, headers=headers)
            producer.flush()
            ids = [event_id for event_id, *_ in rows]
            connection.execute("UPDATE outbox SET processed_at = now() WHERE id = ANY(%s::uuid[])", [ids])
            connection.commit()
            if not rows:
                time.sleep(_SLEEP_SECONDS)


if __name__ == "__main__":
    main()
