"""The loop, with what befalls a group of consumers: each event has one effect, in its aggregate's order."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka import Consumer

from cdc_outbox.inbox.attempts import DIED
from cdc_outbox.inbox.psycopg import Inbox
from fault.consumers import Consumers, consumers_of
from fault.loop_consumer import Settings
from fault.stage import Stage
from support.waiting import wait_until
from support.world import World, create_topic

KILLS = 200


@pytest.fixture
def consumers(world: World, tmp_path: Path) -> Iterator[Consumers]:
    topic = f"outbox.{world.create_topic()}"
    with consumers_of(Settings(world.dsn, world.bootstrap_servers, topic, world.name), tmp_path) as made:
        yield made


def test_killed_at_two_hundred_points_with_each_record_three_times(consumers: Consumers) -> None:
    """Three consumers, killed around both of their commits; some keys are poison all the while."""
    events, keys, poisoned = 6000, 1000, ("a-7", "a-77", "a-777")
    for key in poisoned:
        consumers.poison(key, "raises")
    consumers.produce(events, keys=keys, times=3)
    ending = threading.Event()
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            consumers.keep_alive(f"member-{number}", ending, kills=KILLS // 3 + 1, seed=number, handler_seconds=0.001)
        except BaseException as error:  # noqa: BLE001 - told below
            failures.append(error)

    threads = [threading.Thread(target=run, args=[number]) for number in range(3)]
    for thread in threads:
        thread.start()
    begin, deadline = events, time.monotonic() + 200
    while consumers.kills < KILLS and not failures:
        assert time.monotonic() < deadline, consumers.kills
        if consumers.effects() > begin - 3000:  # there is always something to do when one dies
            consumers.produce(2000, keys=keys, times=3, begin=begin)
            begin += 2000
        time.sleep(0.1)
    of_poison = begin // keys * len(poisoned)
    wait_until(lambda: failures or consumers.effects() == begin - of_poison, "the others", timeout_seconds=120)
    wait_until(lambda: failures or consumers.parked().get("parked") == len(poisoned), "all is parked")
    assert failures == []
    assert consumers.parked() == {"parked": len(poisoned), "behind": of_poison - len(poisoned)}
    consumers.db.execute("TRUNCATE poison")
    with psycopg.connect(consumers.settings.dsn) as connection:
        for (message_id,) in consumers.db.execute("SELECT message_id FROM inbox_parked WHERE state = 'parked'"):
            Inbox("billing").unpark(connection, message_id)
    wait_until(lambda: failures or consumers.effects() == begin, "what was parked")
    ending.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert consumers.kills >= KILLS
    verdict = consumers.verdict()
    assert verdict.is_acted_on_once, verdict
    assert consumers.parked() == {"handled": of_poison}


def test_a_rebalance_every_two_seconds_and_one_that_is_frozen(consumers: Consumers) -> None:
    settings = consumers.settings
    members = [consumers.start(handler_seconds=0.005, max_poll_interval_ms=6_000) for _ in range(3)]
    produced, ending = 0, time.monotonic() + 30
    frozen_at, thawed = ending - 24, False
    while time.monotonic() < ending:
        consumers.produce(300, keys=100, times=3, begin=produced)
        produced += 300
        other = Consumer(
            {
                "bootstrap.servers": settings.bootstrap_servers,
                "group.id": settings.group,
                "enable.auto.commit": False,  # what it reads it does not handle
                "auto.offset.reset": "earliest",
                "log_level": 0,
            }
        )
        other.subscribe([settings.topic])
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            other.poll(0.05)
        other.close()
        if time.monotonic() > frozen_at and not thawed:
            os.kill(members[0].pid, signal.SIGSTOP)
        if time.monotonic() > frozen_at + 12 and not thawed:  # past its session, its poll interval
            os.kill(members[0].pid, signal.SIGCONT)
            thawed = True
    assert thawed
    consumers.wait_for_effects(produced)
    for member in members:
        assert member.poll() is None, consumers.log()
        consumers.stop(member)
    verdict = consumers.verdict()
    assert verdict.is_acted_on_once, verdict


def test_poison_among_a_thousand_keys(consumers: Consumers) -> None:
    """Nobody waits for it, and its key's order holds when it is unparked."""
    consumers.produce(3000, keys=1000)
    consumers.poison("a-500", "raises")
    consumer = consumers.start(attempts=10)  # some fifty seconds of trying
    consumers.wait_for_effects(2997)
    assert consumers.parked().get("parked") is None  # they are done, and it is still being tried
    wait_until(lambda: consumers.parked() == {"parked": 1, "behind": 2}, "it is parked", timeout_seconds=120)
    consumers.db.execute("TRUNCATE poison")
    with psycopg.connect(consumers.settings.dsn) as connection:
        Inbox("billing").unpark(connection, "e-500")
    consumers.produce(1000, keys=1000, begin=3000)
    consumers.wait_for_effects(4000)
    consumers.stop(consumer)
    assert consumers.verdict().is_acted_on_once
    assert consumers.parked().keys() == {"handled"}


@pytest.mark.parametrize("on_poison", ["park", "stop"])
def test_a_message_that_ends_the_process_is_found(consumers: Consumers, on_poison: str) -> None:
    """After five lives; without a life in between that does nothing but die."""
    consumers.poison("a-41", "dies")
    consumers.produce(100, keys=100)
    lives = 0

    def live() -> subprocess.Popen[bytes]:
        process = consumers.start(member="one", on_poison=on_poison)
        wait_until(lambda: process.poll() is not None or consumers.effects() == 99, "a life", timeout_seconds=30)
        return process

    while (process := live()).poll() == -signal.SIGKILL:
        lives += 1
        assert lives < 10
    assert lives in (5, 6)  # one may have been in a batch, before anybody knew
    if on_poison == "stop":
        assert process.returncode == 1
        assert "PoisonMessage: message 'e-41'" in consumers.log()
        assert DIED in consumers.log()
        return
    wait_until(lambda: consumers.parked() == {"parked": 1}, "it is parked")
    consumers.stop(process)
    consumers.db.execute("TRUNCATE poison")
    with psycopg.connect(consumers.settings.dsn) as connection:
        Inbox("billing").unpark(connection, "e-41")
    process = consumers.start(member="one")
    consumers.wait_for_effects(100)
    consumers.stop(process)
    assert consumers.verdict().is_acted_on_once


@pytest.fixture
def on_stage(stage: Stage, tmp_path: Path) -> Iterator[Consumers]:
    """With servers that may be stopped."""
    topic = f"outbox.{stage.world.name}"
    create_topic(stage.world.bootstrap_servers, topic)
    with consumers_of(
        Settings(stage.world.dsn, stage.world.bootstrap_servers, topic, stage.world.name), tmp_path
    ) as made:
        yield made


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("which", ["kafka", "postgres"])
def test_a_server_is_away_for_a_minute(stage: Stage, on_stage: Consumers, which: str) -> None:
    """No offset is lost, nobody turns round and round, nothing is done twice, and a stop is heard meanwhile."""
    consumers = on_stage
    running = [consumers.start(member=f"member-{number}", handler_seconds=0.002) for number in range(2)]
    consumers.produce(3000, keys=100, times=2)
    consumers.wait_for_effects(500)
    server: Any = stage.servers.kafka if which == "kafka" else stage.servers.postgres
    before = [cpu_seconds(process.pid) for process in running]
    server.kill() if which == "kafka" else server.stop("immediate")
    time.sleep(60)
    spent = [cpu_seconds(process.pid) - cpu for process, cpu in zip(running, before, strict=True)]
    assert max(spent) < 4, spent
    began = time.monotonic()
    consumers.end_loop(running.pop()) if which == "kafka" else consumers.stop(running.pop())
    stopped_seconds = time.monotonic() - began
    server.start()
    if which == "postgres":
        consumers.reconnect()
    running.append(consumers.start(member="member-1"))
    consumers.produce(500, keys=100, times=2, begin=3000)
    consumers.wait_for_effects(3500, timeout_seconds=90)
    for process in running:
        assert process.poll() is None, consumers.log()
        consumers.stop(process)
    verdict = consumers.verdict()
    assert verdict.is_acted_on_once, verdict
    assert consumers.parked() == {}
    assert stopped_seconds < 15
