"""Consumers with an inbox, killed around both of their commits: effects = committed events, in order, each once."""

import random
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from cdc_outbox.demo.ledger import Ledger, Verdict
from cdc_outbox.inbox import schema as inbox_sql
from cdc_outbox.inbox.psycopg import Inbox, Message
from cdc_outbox.outbox.psycopg import Event, Outbox
from fault.inbox_consumer import BUGS, Settings
from support.relays import CheckedRelay
from support.world import World

EVENTS, AGGREGATES = 2000, 40
KILLS, READINGS = 50, 3


class Scenario:
    """Events that a relay has put into a topic, and what consumers make of them."""

    def __init__(self, world: World, topic: str, ledger: Ledger) -> None:
        self._world = world
        self._topic = topic
        self._ledger = ledger
        self.kills = 0

    def consume(self, *, group: str, consumer: str = "billing", kills: int = 0, seed: int = 0, bug: str = "") -> None:
        """Read the topic to its end, killed on the way at points that ``seed`` chooses."""
        dice = random.Random(seed)
        exit_code = -9
        while exit_code == -9:
            settings = Settings(
                self._world.dsn,
                self._world.bootstrap_servers,
                self._topic,
                f"{self._world.name}-{group}",
                consumer,
                dies_at=dice.randint(1, 40) if kills else 0,
                bug=bug,
                seed=dice.randrange(1_000_000),
            )
            done = subprocess.run(
                [sys.executable, "-m", "fault.inbox_consumer", settings.as_argument()],
                cwd=Path(__file__).parents[1],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            exit_code = done.returncode
            assert exit_code in (0, -9), done.stderr
            self.kills += exit_code == -9
            kills -= exit_code == -9

    def verdict(self, consumer: str = "billing") -> Verdict:
        self._ledger.effects.clear()
        self._ledger.take_effects(
            self._world.db.execute(
                "SELECT aggregate_id, event_id FROM effect WHERE consumer = %s ORDER BY place", [consumer]
            ).fetchall()
        )
        return self._ledger.verdict()


@pytest.fixture(params=["plain", "partitioned"])
def scenario(request: pytest.FixtureRequest, world: World, tmp_path: Path) -> Scenario:
    world.migrate()
    world.db.execute(inbox_sql.sql(partitioned=request.param == "partitioned").encode())
    world.db.execute(
        "CREATE TABLE effect"
        " (place bigint GENERATED ALWAYS AS IDENTITY, consumer text, aggregate_id text, event_id text)"
    )
    kind, ledger, outbox = world.create_topic(), Ledger(), Outbox()
    with CheckedRelay({**world.environment, "CDC_OUTBOX_HTTP__LISTEN": "127.0.0.1:0"}, tmp_path / "relay.log"):
        with psycopg.connect(world.dsn) as connection:
            for number in range(EVENTS):
                aggregate = f"a-{number % AGGREGATES}"
                event_id = outbox.emit(connection, Event("changed", aggregate, {"n": number}, aggregate_type=kind))
                connection.commit()
                ledger.commit([(aggregate, str(event_id))])
        world.wait_until_confirmed()
    return Scenario(world, f"outbox.{kind}", ledger)


def test_whatever_dies_each_event_has_one_effect(scenario: Scenario) -> None:
    for reading in range(READINGS):
        scenario.consume(group=str(reading), kills=KILLS // READINGS + 1, seed=reading)
    assert scenario.kills >= KILLS
    verdict = scenario.verdict()
    assert verdict.is_acted_on_once, verdict
    assert verdict.effects == EVENTS


@pytest.mark.parametrize("scenario", ["plain"], indirect=True)
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(scenario: Scenario, bug: str) -> None:
    scenario.consume(group="one", kills=KILLS // READINGS, seed=1, bug=bug)
    verdict = scenario.verdict()
    assert not verdict.is_acted_on_once
    assert verdict.effects_missing > 0


@pytest.mark.parametrize("scenario", ["plain"], indirect=True)
def test_two_consumers_need_two_names(scenario: Scenario, world: World) -> None:
    """A planted bug, too: the key without the consumer's name is the same name for both."""
    scenario.consume(group="billing", consumer="billing")
    scenario.consume(group="shipping", consumer="shipping")
    assert scenario.verdict("billing").is_acted_on_once
    assert scenario.verdict("shipping").is_acted_on_once
    world.db.execute("UPDATE inbox SET consumer = 'everybody' WHERE consumer = 'billing'")
    world.db.execute("TRUNCATE effect")
    scenario.consume(group="mail", consumer="everybody")
    verdict = scenario.verdict("everybody")
    assert not verdict.is_acted_on_once
    assert verdict.effects_missing == EVENTS


@pytest.mark.parametrize("kind", ["plain", "partitioned"])
def test_a_million_ids_are_forgotten_while_consumers_run(world: World, kind: str) -> None:
    """No deadlock, and nobody waits for it longer than a tenth of a second."""
    world.db.execute(inbox_sql.sql(partitioned=kind == "partitioned").encode())
    if kind == "partitioned":  # one that will be dropped, and one whose rows will be deleted
        world.db.execute(
            """DO $$ BEGIN EXECUTE format('CREATE TABLE past PARTITION OF inbox FOR VALUES FROM (%L) TO (%L)',
                current_date - 12, current_date - 8); END $$"""
        )
    world.db.execute(
        """INSERT INTO inbox
           SELECT 'billing', '', gen_random_uuid(), now() - CASE WHEN n % 2 = 0 THEN interval '10 days' ELSE '0' END,
                  now() - interval '8 days'
             FROM generate_series(1, 1000000) AS n"""
    )
    world.db.execute("ANALYZE inbox")
    inbox, stopping = Inbox("billing"), threading.Event()
    handled: list[int] = []
    waits_seconds: list[float] = []
    failures: list[Exception] = []

    def consume(number: int) -> None:
        try:
            with psycopg.connect(world.dsn, autocommit=True) as connection:
                connection.execute("SET deadlock_timeout = '10ms'")
                while not stopping.is_set():
                    now = datetime.now(UTC)
                    messages = [Message(f"{number}-{len(handled)}-{each}", now) for each in range(20)]
                    with connection.transaction():
                        handled.append(len(inbox.once_many(connection, messages)))
        except Exception as error:  # noqa: BLE001 - told below
            failures.append(error)

    def watch() -> None:
        """How long anybody has waited for a lock, asked a hundred times a second."""
        with psycopg.connect(world.dsn, autocommit=True) as connection:
            while not stopping.wait(0.01):
                rows = connection.execute(
                    "SELECT extract(epoch FROM clock_timestamp() - waitstart)::float FROM pg_locks"
                    " JOIN pg_stat_activity USING (pid) WHERE NOT granted AND waitstart IS NOT NULL"
                    " AND datname = current_database()"
                ).fetchall()
                waits_seconds.extend(seconds for (seconds,) in rows)

    threads = [threading.Thread(target=consume, args=[number]) for number in range(3)]
    threads.append(threading.Thread(target=watch))
    for thread in threads:
        thread.start()
    with psycopg.connect(world.dsn, autocommit=True) as connection:
        deleted = inbox.prune(connection, timedelta(days=7))
    stopping.set()
    for thread in threads:
        thread.join()
    assert failures == []
    is_dropped = world.db.execute("SELECT to_regclass('past')").fetchone() == (None,)
    assert deleted == (500_000 if kind == "partitioned" and is_dropped else 1_000_000)
    assert set(handled) == {20}
    assert max(waits_seconds, default=0.0) < 0.1
    assert world.db.execute("SELECT FROM inbox WHERE processed_at < now() - interval '7 days'").rowcount == 0
