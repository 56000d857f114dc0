"""*Published* means that Kafka has it: tables taken away from what is sent, under a relay that runs or is away.

After each the offline question: is there a row that Kafka does not have and that the view calls published, or that
prune has deleted? The answer is no.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import pytest

from cdc_outbox.demo.relay import RelayProcess
from support import command
from support.relays import CheckedRelay
from support.waiting import wait_until
from support.world import World, headers_of, read_topic

COLUMNS = "id uuid, aggregate_type text, aggregate_id text, event_type text, payload json, created_at timestamptz"
PARTITIONS = (
    "CREATE TABLE outbox_a PARTITION OF outbox FOR VALUES IN ('a')",
    "CREATE TABLE outbox_b PARTITION OF outbox DEFAULT",
)


RunRelay = Callable[[], AbstractContextManager[RelayProcess]]


@dataclass
class Ledger:
    """What was inserted, and the offline question about it."""

    world: World
    aggregate_type: str
    ids: list[str] = field(default_factory=list)

    def insert(self, table: str = "outbox", count: int = 3) -> list[str]:
        ids = [
            str(row[0])
            for _ in range(count)
            for row in self.world.db.execute(
                f"INSERT INTO {table} (id, aggregate_type, aggregate_id, event_type, payload, created_at)"
                " VALUES (gen_random_uuid(), %s, 'a', 't', '{}', now()) RETURNING id",
                [self.aggregate_type],
            ).fetchall()
        ]
        self.ids += ids
        return ids

    def in_kafka(self) -> set[str]:
        topic = f"outbox.{self.aggregate_type}"
        return {str(dict(headers_of(message))["id"]) for message in read_topic(self.world.bootstrap_servers, topic, 0)}

    def states(self) -> dict[str, str]:
        status = "SELECT outbox_id::text, state, published FROM cdc_outbox.event_status"
        rows = self.world.db.execute(status).fetchall()
        assert all((state == "published") == published for _, state, published in rows)
        return {event_id: state for event_id, state, _ in rows}

    def wait_until_published(self, *ids: str) -> None:
        def all_are() -> bool:
            states = self.states()
            self.check()
            return all(states[event_id] == "published" for event_id in ids)

        wait_until(all_are, "all of it is known to be published", timeout_seconds=30)

    def check(self) -> None:
        """Raises AssertionError if anything is called published that Kafka does not have."""
        published = {event_id for event_id, state in self.states().items() if state == "published"}
        assert published <= self.in_kafka()

    def prune_and_check(self, also: str = "") -> set[str]:
        """What is left, in the outbox and where ``also`` says."""
        self.check()
        done = command.run(self.world.environment, "prune", "--older-than", "0s")
        assert done.exit_code == 0, done
        left = {str(row[0]) for row in self.world.db.execute(f"SELECT id FROM outbox {also}").fetchall()}
        assert set(self.ids) - left <= self.in_kafka()
        return left


@pytest.fixture
def ledger(old_and_new_world: World) -> Ledger:
    return Ledger(old_and_new_world, old_and_new_world.create_topic())


@pytest.fixture
def relay_of(ledger: Ledger, tmp_path_factory: pytest.TempPathFactory) -> RunRelay:
    @contextmanager
    def run() -> Iterator[RelayProcess]:
        world = ledger.world
        settings = {key: value for key, value in world.environment.items() if key != "CDC_OUTBOX_HTTP__LISTEN"}
        with CheckedRelay(settings, tmp_path_factory.mktemp("relay") / "relay.log") as relay:
            relay.wait_until_ready()
            yield relay

    return run


@dataclass
class Hole:
    """Statements that take the outbox away from what is sent, and give it back; and where rows go meanwhile."""

    away: str
    back: str
    table: str = "outbox"
    #: what the relay says of it, and ends with exit 3
    said: str = ""
    prepare: str = ""
    #: where rows are in the end that are not in the outbox
    also: str = ""
    partitioned: bool = False
    since: int = 14


HOLES = {
    "out of the publication": Hole(
        "ALTER PUBLICATION cdc_outbox DROP TABLE outbox",
        "ALTER PUBLICATION cdc_outbox ADD TABLE outbox",
        said="does not list table public.outbox",
    ),
    "row filter": Hole(
        "ALTER PUBLICATION cdc_outbox SET TABLE outbox WHERE (event_type = 'x'), cdc_outbox.canary",
        "ALTER PUBLICATION cdc_outbox SET TABLE outbox, cdc_outbox.canary",
        said="sends only some rows of public.outbox",
        since=15,
    ),
    "root setting": Hole(
        "ALTER PUBLICATION cdc_outbox SET (publish_via_partition_root = false)",
        "ALTER PUBLICATION cdc_outbox SET (publish_via_partition_root = true)",
        said="under the names of its partitions",
        partitioned=True,
    ),
    "child": Hole(
        "CREATE TABLE child () INHERITS (outbox)",
        "ALTER TABLE child NO INHERIT outbox",
        table="child",
        also="UNION ALL SELECT id FROM child",
        said="table public.child inherits from public.outbox",
    ),
    "unlogged": Hole(
        "ALTER TABLE outbox SET UNLOGGED",
        "ALTER TABLE outbox SET LOGGED",
        said="table public.outbox is unlogged",
        prepare="DROP PUBLICATION cdc_outbox; CREATE PUBLICATION cdc_outbox FOR ALL TABLES WITH (publish = 'insert')",
    ),
    "renamed": Hole(
        "ALTER TABLE outbox RENAME TO elsewhere",
        "ALTER TABLE elsewhere RENAME TO outbox",
        table="elsewhere",
        said="table public.outbox does not exist",
    ),
    "detached and attached": Hole(
        "ALTER TABLE outbox DETACH PARTITION outbox_a",
        "ALTER TABLE outbox ATTACH PARTITION outbox_a FOR VALUES IN ('a')",
        table="outbox_a",
        partitioned=True,
    ),
}


def make(ledger: Ledger, hole: Hole) -> None:
    world = ledger.world
    world.db.execute(
        f"CREATE TABLE outbox ({COLUMNS}) {'PARTITION BY LIST (aggregate_id)' * hole.partitioned}".encode()
    )
    for partition in PARTITIONS * hole.partitioned:
        world.db.execute(partition.encode())
    if hole.prepare:
        world.db.execute("CREATE PUBLICATION cdc_outbox")
        world.db.execute(hole.prepare.encode())
    world.migrate()


@pytest.mark.rest
@pytest.mark.parametrize("hole", HOLES.values(), ids=HOLES.keys())
def test_a_hole_under_a_relay_that_runs(ledger: Ledger, relay_of: RunRelay, hole: Hole) -> None:
    if ledger.world.db.info.server_version < hole.since * 10_000:
        return
    make(ledger, hole)
    with relay_of() as relay:
        before = ledger.insert()
        ledger.wait_until_published(*before)
        ledger.world.db.execute(hole.away.encode())
        ledger.insert(hole.table, count=5)
        if hole.said:
            assert relay.process.wait(15) == 3
            assert hole.said in relay.said()
    ledger.insert(hole.table, count=5)
    ledger.world.db.execute(hole.back.encode())
    with relay_of():
        ledger.world.wait_until_confirmed()
        ledger.check()
        after = publish_until_told(ledger) if hole is HOLES["out of the publication"] else []
    left = ledger.prune_and_check(hole.also)
    assert not left & set(after), "what is certain is pruned"


def publish_until_told(ledger: Ledger) -> list[str]:
    """Events from after the hole: those are known to be published that were written once the relay had looked twice."""

    def told() -> list[str]:
        ids = ledger.insert(count=1)
        wait_until(lambda: set(ids) <= ledger.in_kafka(), "Kafka has it")
        states = ledger.states()
        ledger.check()
        return [event_id for event_id in ledger.ids if states.get(event_id) == "published"]

    known = set(told())
    return wait_until(lambda: [event_id for event_id in told() if event_id not in known], "told", timeout_seconds=40)


@pytest.mark.rest
def test_a_poller_s_column_makes_nothing_published(ledger: Ledger, relay_of: RunRelay) -> None:
    world = ledger.world
    world.db.execute(f"CREATE TABLE outbox ({COLUMNS}, status text)".encode())
    never = ledger.insert(count=20)
    world.migrate()
    with relay_of():
        ledger.wait_until_published(*ledger.insert())
        for _ in range(3):
            world.db.execute("UPDATE outbox SET status = 'done'")
            ledger.check()
        publish_until_told(ledger)
    left = ledger.prune_and_check()
    assert set(never) <= left


def test_a_renamed_outbox_with_a_backlog(ledger: Ledger, relay_of: RunRelay) -> None:
    """Rows come under the name that the table had when they were written."""
    world = ledger.world
    make(ledger, HOLES["renamed"])
    waiting = ledger.insert(count=10)
    world.db.execute("ALTER TABLE outbox RENAME TO events")
    waiting += ledger.insert("events", count=1)
    world.settings["CDC_OUTBOX_OUTBOX__TABLE"] = "events"
    with relay_of():
        world.wait_until_confirmed()
        wait_until(lambda: set(waiting) <= ledger.in_kafka(), "all of it comes")


def test_rows_written_under_the_names_of_partitions_are_not_passed_over(ledger: Ledger, relay_of: RunRelay) -> None:
    world = ledger.world
    make(ledger, HOLES["root setting"])
    world.db.execute("ALTER PUBLICATION cdc_outbox SET (publish_via_partition_root = false)")
    waiting = ledger.insert()
    refused = command.run(world.environment, "run")
    assert (refused.exit_code, "publish_via_partition_root = true" in refused.error) == (3, True)
    world.db.execute("ALTER PUBLICATION cdc_outbox SET (publish_via_partition_root = true)")
    with relay_of():
        world.wait_until_confirmed()
    assert set(waiting) <= ledger.in_kafka()


@pytest.mark.parametrize("away", ["listed", "in the log only"])
def test_a_row_of_a_listed_table_that_nobody_routes_ends_the_relay(
    ledger: Ledger, relay_of: RunRelay, away: str
) -> None:
    world = ledger.world
    make(ledger, HOLES["renamed"])
    world.db.execute("CREATE TABLE stranger (a int)")
    world.db.execute("ALTER PUBLICATION cdc_outbox ADD TABLE stranger")
    world.db.execute("INSERT INTO stranger VALUES (1)")
    if away == "in the log only":
        world.db.execute("ALTER PUBLICATION cdc_outbox DROP TABLE stranger")
        world.insert("x")
    done = command.run(world.environment, "run")
    if away == "listed":
        assert "lists public.stranger besides" in command.run(world.environment, "doctor").out
        assert (done.exit_code, "a row of table public.stranger has come" in done.error) == (3, True)
        assert "outbox.ignore_tables = ['public.stranger']" in done.error
    world.settings["CDC_OUTBOX_OUTBOX__IGNORE_TABLES"] = '["public.stranger"]'
    world.settings["CDC_OUTBOX_KAFKA__CREATE_TOPICS"] = "true"
    with relay_of():
        world.wait_until_confirmed()


@pytest.mark.parametrize("kind", ["ALL TABLES", "TABLES IN SCHEMA public"])
@pytest.mark.rest
def test_other_tables_of_a_publication_that_takes_them_all_are_passed_over(
    ledger: Ledger, relay_of: RunRelay, kind: str
) -> None:
    world = ledger.world
    world.db.execute(f"CREATE TABLE outbox ({COLUMNS})".encode())
    world.db.execute("CREATE TABLE stranger (a int)")
    world.db.execute(f"CREATE PUBLICATION cdc_outbox FOR {kind} WITH (publish = 'insert')".encode())
    world.migrate()
    world.db.execute("INSERT INTO stranger VALUES (1)")
    with relay_of():
        ledger.wait_until_published(*ledger.insert())
        world.db.execute("INSERT INTO stranger VALUES (2)")
        ledger.wait_until_published(*ledger.insert())


def test_what_was_there_before_and_what_waits_are_told_apart(ledger: Ledger) -> None:
    world = ledger.world
    world.db.execute(f"CREATE TABLE outbox ({COLUMNS})".encode())
    before = ledger.insert(count=20)
    world.migrate()
    waiting = ledger.insert()
    states = ledger.states()
    assert {states[event_id] for event_id in before} == {"unknown"}
    assert {states[event_id] for event_id in waiting} == {"pending"}
    shown = command.run(world.environment, "status", "--stuck", "1h")
    assert shown.out.startswith("nothing is stuck\nof 20 rows it cannot be told whether they were published")
    assert shown.out.endswith("SELECT * FROM cdc_outbox.event_status WHERE state = 'unknown'\n")
