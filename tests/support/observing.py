"""What the acceptance tests ask of a running relay, and the load they put on it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import HTTPError
from urllib.request import urlopen

from cdc_outbox.demo.relay import RelayProcess
from support.waiting import wait_until
from support.world import World, headers_of


def readyz(relay: RelayProcess) -> dict[str, object]:
    """Status and body of its answer."""
    try:
        with urlopen(f"http://{relay.address}/readyz", timeout=5) as answer:
            return {"status": answer.status, **json.load(answer)}
    except HTTPError as answer:
        return {"status": answer.code, **json.load(answer)}


def readyz_state(relay: RelayProcess) -> object:
    try:
        return readyz(relay)["state"]
    except OSError:
        return None


def delivered_ids(world: World, aggregate_type: str, count: int) -> list[str]:
    messages = world.read(aggregate_type, count)
    return [str(dict(headers_of(message))["id"]) for message in messages]


@contextmanager
def load(world: World, aggregate_type: str) -> Iterator[list[str]]:
    """Inserts about 500 single-event transactions a second meanwhile; the ids in commit order."""
    ids: list[str] = []
    stopping = threading.Event()

    def write() -> None:
        while not stopping.wait(0.002):
            ids.append(world.insert(aggregate_type, f"a-{len(ids) % 20}"))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield ids
    finally:
        stopping.set()
        thread.join()


def wait_for_load(world: World, ids: list[str]) -> None:
    """Until the relay has caught up and goes on for a while."""
    world.wait_until_confirmed()
    enough = len(ids) + 200
    wait_until(lambda: len(ids) > enough, "load")
