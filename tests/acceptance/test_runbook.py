"""The runbook's own statements, carried out."""

import re
from pathlib import Path

import pytest

from acceptance.conftest import StartRelay
from support import command
from support.waiting import wait_until
from support.world import World, headers_of

_RUNBOOK = Path(__file__).parents[2] / "deploy" / "runbook.md"


def statements(section: str, number: int) -> str:
    """The section's SQL blocks, by number."""
    text = re.search(rf"^#+ {section}\n(.*?)(?=^#+ |\Z)", _RUNBOOK.read_text(), re.MULTILINE | re.DOTALL)
    assert text
    blocks: list[str] = re.findall(r"```sql\n(.*?)```", text[1], re.DOTALL)
    return blocks[number]


def ids(world: World, aggregate_type: str, count: int) -> set[str | None]:
    return {dict(headers_of(record))["id"] for record in world.read(aggregate_type, count)}


@pytest.mark.rest
def test_a_lost_slot_is_created_again_and_the_gap_is_sent(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    relay = start_relay()
    published = {world.insert(aggregate_type) for _ in range(3)}
    wait_until(lambda: world.db.execute("SELECT FROM cdc_outbox.event_status WHERE published").rowcount == 3, "noted")
    relay.__exit__(None, None, None)
    lost = {world.insert(aggregate_type) for _ in range(3)}
    world.db.execute("SELECT pg_drop_replication_slot(%s)", [world.slot])
    lost.add(world.insert(aggregate_type))
    row = world.db.execute("SELECT now()::text").fetchone()
    assert row
    assert command.run(world.environment, "migrate", "up").exit_code == 0
    refused = command.run(world.environment, "run")
    assert refused.exit_code == 3
    accept = re.search(r"accept the gap: (DELETE FROM cdc_outbox.confirmation .*?), and start", refused.error)
    assert accept
    world.db.execute(accept[1].encode())
    start_relay()
    after = world.insert(aggregate_type)
    assert ids(world, aggregate_type, 4) == published | {after}
    listed = world.db.execute(statements("Slot lost", 1).rstrip(" ;\n").encode())
    assert listed.rowcount >= 4
    world.db.execute(statements("Slot lost", 2).replace("<when step 2 was done>", row[0]).encode())
    assert ids(world, aggregate_type, 8) == published | {after} | lost


def test_uninstalled_nothing_is_left_but_the_roles(world: World) -> None:
    world.migrate()
    world.insert("t")
    script = statements("Uninstall", 1).replace("'cdc_outbox'", f"'{world.slot}'")
    for line in script.splitlines():
        statement = line.partition("--")[0]
        world.db.execute(statement.encode())
    query = (
        "SELECT (SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s),"
        " (SELECT count(*) FROM pg_publication),"
        " to_regclass('outbox'), to_regnamespace('cdc_outbox')"
    )
    assert world.db.execute(query, [world.slot]).fetchone() == (0, 0, None, None)


def test_every_statement_of_the_runbook_that_only_looks_can_be_run(world: World) -> None:
    world.migrate()
    world.insert("t")
    for block in re.findall(r"```sql\n\s*(SELECT slot_name.*?)```", _RUNBOOK.read_text(), re.DOTALL):
        assert world.db.execute(block.rstrip().encode()).rowcount >= 1


def test_rows_of_a_table_that_left_the_publication_are_listed(world: World) -> None:
    world.migrate()
    world.db.execute("ALTER PUBLICATION cdc_outbox DROP TABLE outbox")
    assert command.run(world.environment, "run").exit_code == 3
    event_id = world.insert("t")
    world.db.execute("ALTER PUBLICATION cdc_outbox ADD TABLE outbox")
    world.settings["CDC_OUTBOX_KAFKA__CREATE_TOPICS"] = "true"
    with command.start(world.environment, "run") as relay:
        try:
            look = statements("Table left the publication", 0).rstrip(" ;\n").encode()
            (row,) = wait_until(lambda: world.db.execute(look).fetchall(), "it is told", timeout_seconds=30)
            assert str(row[0]) == event_id
        finally:
            relay.terminate()
            assert relay.wait(20) == 0


def test_one_of_two_outboxes_is_taken_out_of_the_view(world: World) -> None:
    world.migrate()
    other = {
        **world.environment,
        "CDC_OUTBOX_POSTGRES__SLOT": f"{world.slot}_other",
        "CDC_OUTBOX_POSTGRES__PUBLICATION": "other",
        "CDC_OUTBOX_OUTBOX__TABLE": "other",
    }
    world.db.execute("CREATE TABLE other (LIKE outbox)")
    assert command.run(other, "migrate", "up").exit_code == 0
    query = "SELECT prosrc LIKE '%UNION ALL%' FROM pg_proc WHERE proname = 'event_status_rows'"
    assert world.db.execute(query).fetchone() == (True,)
    for statement in statements("Uninstall", 3).replace("the_slot", f"{world.slot}_other").strip().split(";\n"):
        world.db.execute(statement.rstrip(";").encode())
    assert world.db.execute(query).fetchone() == (False,)
