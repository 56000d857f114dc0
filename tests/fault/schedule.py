"""Random schedules: any fault, alone or two at once, under load, one after another; all of it from one seed."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial

import psycopg

from fault.proxy import Proxy
from fault.stage import Stage

Fault = Callable[[Stage, random.Random], AbstractContextManager[None]]


def play(stage: Stage, seed: int, *, seconds: float, say: Callable[[str], None] = lambda _: None) -> None:
    """Faults for ``seconds`` at least; afterwards everything runs again, and the stage can be closed."""
    rng = random.Random(seed)
    stage.start_relay()
    stage.start_relay(wait=False)
    stage.start_writer(seed=seed, events_per_second=rng.choice((300, 1000, 3000)), poison_share=0.001)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stage.wait_for_events(rng.randint(50, 800))
        names = _choose(rng)
        say(" + ".join(names))
        with stage.incident(), ExitStack() as stack:
            for name in names:
                stack.enter_context(FAULTS[name](stage, rng))
            time.sleep(rng.uniform(0.1, 3.0))  # how long it lasts is chance, too


def _choose(rng: random.Random) -> list[str]:
    """One fault, or two of different kinds: what is dead cannot be frozen."""
    first, second = rng.choice(sorted(FAULTS)), rng.choice(sorted(FAULTS))
    return [first, second] if rng.random() < 0.4 and first.split()[0] != second.split()[0] else [first]


@contextmanager
def relay_killed(stage: Stage, rng: random.Random) -> Iterator[None]:
    stage.kill(rng.choice(stage.relays))
    try:
        yield
    finally:
        stage.start_relay(wait=False)


@contextmanager
def relay_stopped(stage: Stage, rng: random.Random) -> Iterator[None]:
    relay = rng.choice(stage.relays)
    stage.relays.remove(relay)
    relay.process.send_signal(signal.SIGTERM)
    try:
        yield
    finally:
        assert relay.process.wait(60) == 0, relay.said()  # it may have to wait for a broker that was taken away
        stage.start_relay(wait=False)


@contextmanager
def relay_frozen(stage: Stage, rng: random.Random) -> Iterator[None]:
    relay = rng.choice(stage.relays)
    os.kill(relay.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if not relay.ended:
            os.kill(relay.process.pid, signal.SIGCONT)


@contextmanager
def walsender_terminated(stage: Stage, rng: random.Random) -> Iterator[None]:
    with suppress(psycopg.OperationalError):  # the server may be down, too
        stage.terminate_walsender()
    yield


@contextmanager
def postgres_stopped(mode: str, stage: Stage, rng: random.Random) -> Iterator[None]:
    stage.servers.postgres.stop(mode)  # type: ignore[arg-type]
    try:
        yield
    finally:
        stage.servers.postgres.start()


@contextmanager
def kafka_killed(stage: Stage, rng: random.Random) -> Iterator[None]:
    stage.servers.kafka.kill()
    try:
        yield
    finally:
        stage.servers.kafka.start()


@contextmanager
def kafka_frozen(stage: Stage, rng: random.Random) -> Iterator[None]:
    os.kill(stage.servers.kafka.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(stage.servers.kafka.pid, signal.SIGCONT)


@contextmanager
def network(side: str, do: Callable[[Proxy], None], stage: Stage, rng: random.Random) -> Iterator[None]:
    proxy = stage.servers.postgres_proxy if side == "postgres" else stage.servers.kafka_proxy
    do(proxy)
    try:
        yield
    finally:
        proxy.restore()


_NETWORK: dict[str, Callable[[Proxy], None]] = {
    "refuses": Proxy.refuse,
    "falls silent": Proxy.fall_silent,
    "swallows answers": Proxy.swallow_answers,
    "delays": lambda proxy: proxy.delay(0.1),
    "trickles": Proxy.trickle,
    "cuts": lambda proxy: proxy.cut_after(20_000, towards="client"),
    "resets": Proxy.reset,
}

FAULTS: dict[str, Fault] = {
    "relay killed": relay_killed,
    "relay stopped": relay_stopped,
    "relay frozen": relay_frozen,
    "walsender terminated": walsender_terminated,
    "postgres stopped fast": partial(postgres_stopped, "fast"),
    "postgres stopped immediate": partial(postgres_stopped, "immediate"),
    "kafka killed": kafka_killed,
    "kafka frozen": kafka_frozen,
    **{
        f"network to {side} {name}": partial(network, side, do)
        for side in ("postgres", "kafka")
        for name, do in _NETWORK.items()
    },
}
