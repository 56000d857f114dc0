"""Which policy governs from where in the log, as the relay remembers it."""

import pytest

from cdc_outbox.errors import OperatorNeeded
from cdc_outbox.journal import policies
from cdc_outbox.postgres.connection import connect
from cdc_outbox.relay.policy.gate import Gates
from cdc_outbox.relay.requests import PolicyRequest
from cdc_outbox.wal.lsn import LSN
from cdc_outbox.wal.position import Position
from support.world import World


def source(name: str) -> bytes:
    return f'version = 1\n[[rule]]\nid = "{name}"\nverdict = "allow"\n'.encode()


def activate(world: World, name: str, commit_lsn: int, ordinal: int = 1, *, system: str = "1", slot: str = "s") -> None:
    gates = policies.compiled(source(name))
    assert isinstance(gates, Gates)
    request = PolicyRequest(hash((name, system, slot)) % 2**31, slot, source(name), "me", "why")
    position = Position(LSN(commit_lsn), ordinal)
    with connect(world.dsn) as connection:
        for _ in range(2):  # once more after a crash
            policies.activated(connection, system, request, position, gates.policy.sha256)


def governing(world: World, before: int, *, system: str = "1", slot: str = "s") -> str | None:
    with connect(world.dsn) as connection:
        gates = policies.in_force(connection, system, slot, before=LSN(before))
    return gates.policy.rules[0].id if gates is not None else None


def test_the_last_one_before_the_place_where_reading_starts_governs(every_world: World) -> None:
    world = every_world
    world.migrate()
    assert governing(world, 100) is None
    activate(world, "late", 300)
    activate(world, "second", 100, 2)
    activate(world, "first", 100, 1)
    activate(world, "middle", 200)
    activate(world, "another-slot-s", 250, slot="t")
    assert [governing(world, at) for at in (99, 100, 101, 200, 201, 300, 301)] == [
        *(None, None),  # the transaction at 100 comes again, and its request with it
        *("second", "second"),
        *("middle", "middle"),
        "late",
    ]
    assert governing(world, 999, slot="t") == "another-slot-s"


def test_what_governed_goes_on_where_the_log_began_anew(world: World) -> None:
    world.migrate()
    activate(world, "old", 900)
    activate(world, "older", 800)
    assert governing(world, 5, system="2") == "older", "the one that was activated last"
    activate(world, "new", 10, system="2")
    assert governing(world, 10, system="2") == "older"
    assert governing(world, 11, system="2") == "new"


def test_one_that_cannot_be_read_any_more_lets_nothing_pass(world: World) -> None:
    world.migrate()
    activate(world, "old", 10)
    world.db.execute("UPDATE cdc_outbox.policy SET source = 'version = 7'")
    with pytest.raises(OperatorNeeded, match=r"the policy in force cannot be read: line 1: unknown version 7 \(1\)"):
        governing(world, 11)


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("version = 2", "line 1: unknown version 2 (1)"),
        ("version = 2\nx = 1\ny = 1", "line 1: unknown version 2 (1), and 2 more"),
        (
            'version = 1\non_error = { verdict = "approve", approvers = ["a"] }',
            "on_error: verdict approve comes with a later version; this one can allow and deny",
        ),
        (
            'version = 1\n[[rule]]\nid = "r"\nverdict = "deny"\nthen = "freeze"',
            'r: then = "freeze" comes with a later version',
        ),
    ],
)
def test_what_cannot_govern_is_refused(text: str, refusal: str) -> None:
    assert policies.compiled(text.encode()) == refusal
