"""Latency: from just before INSERT to a consumer in another process, at a steady rate, default configuration."""

import json
import multiprocessing
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final

import psycopg
from confluent_kafka import Consumer, TopicPartition

from benchmarks.arena import Arena
from benchmarks.drain import Incomplete
from benchmarks.lane import PARTITIONS, Lane, open_lane
from benchmarks.peers.relay import Relay

_WARM_UP_SECONDS: Final = 3.0
_WRITERS: Final = 4
_INSERT: Final = "INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload) VALUES (%s, %s, 'Sent', %s)"


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds."""

    rate: int
    reached_rate: float
    events: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float


def measure_latency(arena: Arena, rate: int, seconds: float) -> Latency:
    """Raises Incomplete."""
    with open_lane(arena) as lane, Relay().start(lane):
        _wait_for_slot(lane)
        receiver, sender = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("spawn")
        consumer = context.Process(target=_consume, args=[arena.bootstrap_servers, lane.topic, sender])
        consumer.start()
        receiver.recv()  # it listens
        sent, began = _write(lane, rate, seconds), time.time()
        samples: list[tuple[float, float]] = []
        while len(samples) < sent:
            if not receiver.poll(20):
                raise Incomplete(f"latency: {len(samples)} of {sent} events arrived")
            samples += receiver.recv()
        consumer.terminate()
        consumer.join()
    first = min(at for at, _ in samples)
    counted = sorted(latency for at, latency in samples if at > first + _WARM_UP_SECONDS)
    return Latency(
        rate,
        round(sent / (began - first), 1),
        len(counted),
        *(round(_percentile(counted, share) * 1000, 2) for share in (0.5, 0.95, 0.99, 1.0)),
    )


def _percentile(ascending: list[float], share: float) -> float:
    return ascending[min(len(ascending) - 1, int(len(ascending) * share))]


def _wait_for_slot(lane: Lane) -> None:
    deadline = time.monotonic() + 20
    while not lane.walsender_pid():
        if time.monotonic() > deadline:
            raise Incomplete("latency: the relay does not stream")
        time.sleep(0.01)


def _write(lane: Lane, rate: int, seconds: float) -> int:
    """Single events, each committed by itself, by several writers; how many."""
    counts: list[int] = []
    writers = min(_WRITERS, max(1, rate // 100))
    threads = [
        threading.Thread(target=lambda: counts.append(_write_alone(lane, rate / writers, seconds)))
        for _ in range(writers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts)


def _write_alone(lane: Lane, rate: float, seconds: float) -> int:
    total = int(rate * (seconds + _WARM_UP_SECONDS))
    with psycopg.connect(lane.dsn, autocommit=True) as connection:
        begin = time.monotonic()
        for number in range(total):
            pause = begin + number / rate - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            payload = json.dumps({"sent": time.time(), "note": "x" * 250})
            connection.execute(_INSERT, [lane.name, f"a-{number % 1000}", payload], prepare=True)
    return total


def _consume(bootstrap_servers: str, topic: str, pipe: Connection) -> None:
    consumer: Any = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "latency",
            "enable.auto.commit": False,
            "fetch.wait.max.ms": 5,
        }
    )
    consumer.assign([TopicPartition(topic, number, 0) for number in range(PARTITIONS)])
    pipe.send("listening")
    while True:
        message = consumer.poll(0.2)
        batch: list[tuple[float, float]] = []
        while message is not None:
            now = time.time()
            sent = json.loads(message.value())["sent"]
            batch.append((sent, now - sent))
            message = consumer.poll(0) if len(batch) < 1000 else None
        if batch:
            pipe.send(batch)
