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
        arguments = [arena.bootstrap_servers, lane.topic, _events(rate, seconds), sender]
        consumer = context.Process(target=_consume, args=arguments)
        consumer.start()
        if not receiver.poll(30):
            raise Incomplete("latency: the consumer's process does not start")
        receiver.recv()  # it listens
        _write(lane, rate, seconds)
        ended = time.time()
        arrived = receiver.poll(30)
        samples: list[tuple[float, float]] = receiver.recv() if arrived else []
        consumer.terminate()
        consumer.join()
    if not arrived:
        raise Incomplete("latency: not all events arrived within 30 s")
    first = min(at for at, _ in samples)
    counted = sorted(latency for at, latency in samples if at > first + _WARM_UP_SECONDS)
    return Latency(
        rate,
        round(len(samples) / (ended - first), 1),
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


def _writers(rate: int) -> int:
    return min(_WRITERS, max(1, rate // 100))


def _events(rate: int, seconds: float) -> int:
    """Whole numbers for every writer, the warm-up included."""
    return int(rate / _writers(rate) * (seconds + _WARM_UP_SECONDS)) * _writers(rate)


def _write(lane: Lane, rate: int, seconds: float) -> None:
    """Single events, each committed by itself, by several writers."""
    writers = _writers(rate)
    events = _events(rate, seconds) // writers
    threads = [threading.Thread(target=_write_alone, args=[lane, rate / writers, events]) for _ in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _write_alone(lane: Lane, rate: float, events: int) -> None:
    with psycopg.connect(lane.dsn, autocommit=True) as connection:
        begin = time.monotonic()
        for number in range(events):
            pause = begin + number / rate - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            payload = json.dumps({"sent": time.time(), "note": "x" * 250})
            connection.execute(_INSERT, [lane.name, f"a-{number % 1000}", payload], prepare=True)


def _consume(bootstrap_servers: str, topic: str, events: int, pipe: Connection) -> None:
    """Sends one list when it has seen ``events``: nothing may hold it up before."""
    consumer: Any = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "latency",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",  # of a new topic a broker says at first that offset 0 is out of range
            "fetch.wait.max.ms": 5,
        }
    )
    consumer.assign([TopicPartition(topic, number, 0) for number in range(PARTITIONS)])
    pipe.send("listening")
    samples: list[tuple[float, float]] = []
    while len(samples) < events:
        message = consumer.poll(0.2)
        if message is not None and not message.error():
            now = time.time()
            sent = json.loads(message.value())["sent"]
            samples.append((sent, now - sent))
    pipe.send(samples)
