"""The policy's verbs, from outside."""

import hashlib
import json
from pathlib import Path

import psycopg
import pytest

from acceptance.conftest import StartRelay
from cdc_outbox.relay.policy.binding import event_sha256
from cdc_outbox.relay.router import Record
from support import command
from support.observing import delivered_ids
from support.policies import ASK, EXAMPLE, FORGED, OPEN, STRICT, activate, denied
from support.waiting import wait_until
from support.world import World, read_topic


def test_a_policy_that_is_in_order(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_bytes(EXAMPLE)
    done = command.run({}, "policy", "check", str(file))
    assert (done.exit_code, done.err) == (0, "")
    assert done.out.startswith(f"{file}: in order, 7 rules, SHA-256 ")
    told = json.loads(command.run({}, "policy", "check", str(file), "--json").out)
    assert (told["rules"], told["mistakes"], told["warnings"]) == (7, [], [])


def test_mistakes_and_warnings_have_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    rules = '[[rule]]\nid = "a"\nverdict = "allow"\n\n[[rule]]\nid = "b"\nverdict = "deny"\n'
    file.write_text(f"version = 1\n{rules}")
    done = command.run({}, "policy", "check", str(file))
    assert done.exit_code == 0
    assert done.err == f"{file}:6: warning: rule b: it can never match: rule a takes all that it could\n"
    file.write_text(f'version = 1\n{rules}when = {{ "payload.x" = {{ over = 3 }} }}\ncolour = "\\u001b[31m"\n')
    done = command.run({}, "policy", "check", str(file))
    assert (done.exit_code, done.out) == (4, "")
    first, second, last = done.err.splitlines()
    assert first == f"{file}:9: rule b: unknown operator 'over' (eq, ne, gt, ge, lt, le, in, exists)"
    assert second.startswith(f"{file}:10: rule b: unknown key 'colour' with verdict 'deny' (id, mode, when, ")
    assert last == f"error: policy {file} has 2 mistakes -- each mistake stands above, with its line"
    told = json.loads(command.run({}, "policy", "check", str(file), "--json").out)
    assert [mistake["line"] for mistake in told["mistakes"]] == [9, 10]


@pytest.mark.parametrize(("name", "named"), [("nope.toml", "no such file"), (".", "is a directory")])
def test_a_policy_that_cannot_be_read(tmp_path: Path, name: str, named: str) -> None:
    done = command.run({}, "policy", "check", str(tmp_path / name))
    assert done.exit_code == 2
    assert named in done.error


def test_what_the_policy_denies_stays_inside_and_the_rest_flows(
    governed: World, tmp_path: Path, start_relay: StartRelay
) -> None:
    world = governed
    aggregate_type = world.create_topic()
    relay = start_relay()
    before = world.insert(aggregate_type, event_type="unknown")
    done = activate(world, tmp_path / "strict.toml")
    sha256 = hashlib.sha256(STRICT).hexdigest()
    assert (done.exit_code, done.out) == (0, f"policy {sha256} is in force\n")
    with world.db.transaction():
        good = [
            world.insert(aggregate_type, event_type="order.created"),
            world.insert(aggregate_type, event_type="refund.asked", payload='{"amount": 500}'),
        ]
        bad = [
            world.insert(aggregate_type, event_type="refund.asked", payload='{"amount": 501}'),
            world.insert(aggregate_type, event_type="refund.asked", payload='{"amount": "5"}'),
            world.insert(aggregate_type, event_type="customer.changed", payload='{"card": "4111"}'),
            world.insert("no topic of that name", event_type="unknown"),
        ]
        good.append(world.insert(aggregate_type, event_type="customer.changed"))
    world.wait_until_confirmed()
    assert delivered_ids(world, aggregate_type, 4) == [before, *good]
    holds = denied(world)
    assert [hold["event_id"] for hold in holds] == bad
    assert [(hold["rule"], hold["reason"]) for hold in holds] == [
        ("", "default"),
        ("small-refund", "error"),
        ("card", "rule"),
        ("", "default"),
    ]
    assert {hold["policy_sha256"] for hold in holds} == {sha256}
    assert relay.metric('cdc_outbox_policy_verdicts_total{rule="card",verdict="deny"}') == 1
    assert relay.metric('cdc_outbox_policy_errors_total{rule="small-refund"}') == 1
    assert relay.metric(f'cdc_outbox_policy_info{{sha256="{sha256}"}}') == 1
    states = {**dict.fromkeys([before, *good], "published"), **dict.fromkeys(bad, "denied")}
    query = "SELECT outbox_id::text, state FROM cdc_outbox.event_status"
    wait_until(lambda: dict(world.db.execute(query).fetchall()) == states, "what became of each row is told")


def test_the_record_says_event_rule_policy_and_reason(governed: World, tmp_path: Path, start_relay: StartRelay) -> None:
    world = governed
    start_relay()
    assert activate(world, tmp_path / "strict.toml").exit_code == 0
    world.insert("a", "k-1", event_type="unknown", payload='{"n":1}', headers='{"by": "agent"}')
    world.insert("a", "k-2", event_type="customer.new", payload='{"card":1}')
    world.wait_until_confirmed()
    kept, hashed = (
        json.loads(command.run(world.environment, "holds", "show", str(hold["id"]), "--json").out)
        for hold in denied(world)
    )
    assert kept["payload"] == {"text": '{"n":1}'}
    assert kept["detail"] == "no rule allows it"
    assert hashed["payload"] is None
    assert (hashed["rule"], hashed["detail"]) == ("card", "rule card")
    headers = [(name, value.encode()) for name, value in kept["headers"]]
    exact = event_sha256(Record("outbox.a", b'{"n":1}', b"k-1", headers))
    assert kept["event_sha256"] == exact.hex()
    shown = command.run(world.environment, "holds", "show", str(kept["id"]))
    assert "no rule allows it" in shown.out
    assert command.run(world.environment, "holds", "show", "99").exit_code == 2
    assert command.run(world.environment, "dead-letters", "show", str(kept["id"])).exit_code == 2, "it is none"
    assert json.loads(command.run(world.environment, "dead-letters", "list", "--all", "--json").out) == []


def test_a_policy_governs_from_its_place_in_the_log(governed: World, tmp_path: Path, start_relay: StartRelay) -> None:
    """Before, and behind the request in one transaction; and also if all of that is read later, and more than once."""
    world = governed
    aggregate_type = world.create_topic()
    good, bad = [], []
    for _ in range(2):
        with world.db.transaction():
            good.append(world.insert(aggregate_type, event_type="x"))
            world.db.execute(ASK, [world.slot, STRICT.decode()])
            bad.append(world.insert(aggregate_type, event_type="x"))
        bad.append(world.insert(aggregate_type, event_type="x"))
        with world.db.transaction():
            bad.append(world.insert(aggregate_type, event_type="x"))
            world.db.execute(ASK, [world.slot, OPEN.decode()])
            good.append(world.insert(aggregate_type, event_type="x"))
    lsn = world.confirmed_lsn()
    for _ in range(2):
        relay = start_relay()
        world.wait_until_confirmed()
        assert list(dict.fromkeys(delivered_ids(world, aggregate_type, 4))) == good
        assert [hold["event_id"] for hold in denied(world)] == bad
        relay.process.terminate()
        relay.process.wait(20)
    assert world.confirmed_lsn() > lsn
    log = json.loads(command.run(world.environment, "policy", "log", "--json").out)
    assert [each["state"] for each in log] == ["in force", "replaced", "replaced", "replaced"]


def test_a_relay_that_is_killed_judges_as_before(governed: World, tmp_path: Path, start_relay: StartRelay) -> None:
    world = governed
    aggregate_type = world.create_topic()
    relay = start_relay()
    assert activate(world, tmp_path / "strict.toml").exit_code == 0
    bad = world.insert(aggregate_type, event_type="x")
    world.wait_until_confirmed()
    relay.process.kill()
    relay.process.wait()
    bad_too = world.insert(aggregate_type, event_type="x")
    good = world.insert(aggregate_type, event_type="order.x")
    start_relay()
    world.wait_until_confirmed()
    assert [hold["event_id"] for hold in denied(world)] == [bad, bad_too]
    assert delivered_ids(world, aggregate_type, 1) == [good]


def test_what_the_relay_cannot_take_leaves_the_old_policy_in_force(
    governed: World, tmp_path: Path, start_relay: StartRelay
) -> None:
    world = governed
    start_relay()
    assert command.run(world.environment, "policy", "show").out.startswith("no policy is in force")
    assert activate(world, tmp_path / "strict.toml").exit_code == 0
    later = tmp_path / "later.toml"
    later.write_text('version = 1\n[[rule]]\nid = "r"\nverdict = "approve"\napprovers = ["a"]\n')
    refused = activate(world, later)
    assert refused.exit_code == 4
    assert "was refused: r: verdict approve comes with a later version" in refused.error
    assert "what was in force before stays so" in refused.error
    # not by our command: the relay reads it, and refuses it
    world.db.execute(
        "INSERT INTO cdc_outbox.request (slot, kind, body, reason) VALUES (%s, 'policy', 'version = 3', 'r')",
        [world.slot],
    )
    world.insert("x", event_type="unknown")
    world.wait_until_confirmed()
    assert len(denied(world)) == 1
    log = json.loads(command.run(world.environment, "policy", "log", "--json").out)
    assert [each["state"] for each in log] == ["refused", "refused", "in force"]
    assert log[0]["detail"] == "line 1: unknown version 3 (1)"
    shown = command.run(world.environment, "policy", "show").out
    assert 'id = "small-refund"' in shown
    assert "ticket 88" in shown
    assert "small-refund" not in command.run(world.environment, "policy", "log").out
    assert hashlib.sha256(STRICT).hexdigest()[:12] in command.run(world.environment, "status").out
    status = json.loads(command.run(world.environment, "status", "--json").out)
    assert status["policy"]["sha256"] == hashlib.sha256(STRICT).hexdigest()
    mistaken = activate(world, tmp_path / "nope.toml")
    assert mistaken.exit_code == 2


def test_without_a_relay_the_request_stands(governed: World, tmp_path: Path, start_relay: StartRelay) -> None:
    world = governed
    late = activate(world, tmp_path / "strict.toml", "--timeout", "1s")
    assert late.exit_code == 4
    assert "was not activated in time: does the relay run? Request 1 stands" in late.error
    (asked,) = json.loads(command.run(world.environment, "policy", "log", "--json").out)
    assert asked["state"] == "requested"
    world.insert("x", event_type="unknown")
    start_relay()
    world.wait_until_confirmed()
    assert len(denied(world)) == 1


def test_a_redrive_is_judged_again(governed: World, tmp_path: Path, start_relay: StartRelay) -> None:
    world = governed
    world.settings["CDC_OUTBOX_RELAY__ON_POISON"] = "dead-letter"
    start_relay()
    world.insert("no topic of that name", event_type="unknown")
    world.wait_until_confirmed()
    assert activate(world, tmp_path / "strict.toml").exit_code == 0
    topic = f"outbox.{world.create_topic()}"
    done = command.run(world.environment, "dead-letters", "redrive", "1", "--topic", topic)
    assert done.exit_code == 4
    assert "refused again: the policy does not allow it: no rule allows it" in done.error
    assert activate(world, tmp_path / "open.toml").exit_code == 0
    assert command.run(world.environment, "dead-letters", "redrive", "1", "--topic", topic).exit_code == 0


def test_who_may_activate(governed: World, tmp_path: Path, start_relay: StartRelay) -> None:
    world = governed
    start_relay()
    for role, may in (("cdc_outbox_policy_admin", True), ("cdc_outbox_reader", False), ("cdc_outbox_relay", False)):
        user = f"{world.name}_{role[-5:]}"
        world.db.execute(f"CREATE ROLE {user} LOGIN PASSWORD 'pw' IN ROLE {role}")
        try:
            dsn = psycopg.conninfo.make_conninfo(world.dsn, user=user, password="pw")
            done = command.run(
                {**world.environment, "CDC_OUTBOX_POSTGRES__DSN": dsn},
                *("policy", "activate", str(tmp_path / "open.toml"), "--reason", "r"),
            )
            assert done.exit_code == (0 if may else 3), done
            with psycopg.connect(dsn, autocommit=True) as session:
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    session.execute(FORGED)
                with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.CheckViolation)):
                    session.execute("INSERT INTO cdc_outbox.request (slot, kind) VALUES ('s', 'redrive')")
        finally:
            world.db.execute(f"DROP ROLE {user}")
    (activation,) = json.loads(command.run(world.environment, "policy", "log", "--json").out)
    assert activation["principal"] == f"{world.name}_admin"


def test_a_relay_of_another_slot_is_not_governed_and_doctor_says_so(
    governed: World, tmp_path: Path, start_relay: StartRelay
) -> None:
    world = governed

    def said() -> tuple[str, str]:
        findings = json.loads(command.run(world.environment, "doctor", "--json").out)["findings"]
        ((state, found),) = [(each["state"], each["found"]) for each in findings if each["check"] == "policy"]
        return state, found

    assert said() == ("ok", "none is in force: every event may go to Kafka")
    start_relay()
    assert activate(world, tmp_path / "strict.toml").exit_code == 0
    assert said()[0] == "ok"
    world.settings["CDC_OUTBOX_POSTGRES__SLOT"] = f"{world.slot}_other"
    assert said() == ("warning", f"none governs slot '{world.slot}_other', but one does '{world.slot}'")


def test_a_relay_that_cannot_read_the_policy_publishes_nothing(governed: World) -> None:
    world = governed
    aggregate_type = world.create_topic()
    world.insert(aggregate_type)
    user = f"{world.name}_blind"
    world.db.execute(f"CREATE ROLE {user} LOGIN REPLICATION PASSWORD 'pw'")
    try:
        dsn = psycopg.conninfo.make_conninfo(world.dsn, user=user, password="pw")
        done = command.run({**world.environment, "CDC_OUTBOX_POSTGRES__DSN": dsn}, "run")
        assert done.exit_code == 3
        assert "cannot read which policy is in force" in done.error
    finally:
        world.db.execute(f"DROP ROLE {user}")
    assert read_topic(world.bootstrap_servers, f"outbox.{aggregate_type}", 0) == []


def test_a_policy_that_is_long_and_wrong_ends_no_relay(governed: World, start_relay: StartRelay) -> None:
    world = governed
    start_relay()
    world.db.execute(ASK, [world.slot, "x = [" + "[" * 100_000])
    world.db.execute(ASK, [world.slot, "".join(f"key{number} = 1\n" for number in range(20_000))])
    world.db.execute(ASK, [world.slot, 'version = 1\n[[rule]]\nid = "a\\u0000"\nverdict = "allow"\n'])
    world.db.execute(ASK, [world.slot, f"version = 1\nx = {'9' * 6000}"])
    world.wait_until_confirmed()
    log = json.loads(command.run(world.environment, "policy", "log", "--json").out)
    assert [each["state"] for each in log] == ["refused"] * 4


@pytest.mark.rest
def test_a_restart_inside_a_large_denied_transaction(governed: World, tmp_path: Path, start_relay: StartRelay) -> None:
    """What was recorded of it is passed over, however much that is."""
    world = governed
    relay = start_relay()
    assert activate(world, tmp_path / "strict.toml").exit_code == 0
    rows = "SELECT i % 100, 'x', '{}' FROM generate_series(1, 100000) i"
    world.db.execute(f"INSERT INTO outbox (aggregate_id, event_type, payload) {rows}".encode())

    def recorded() -> int:
        row = world.db.execute("SELECT count(*) FROM cdc_outbox.parked").fetchone()
        assert row
        return int(row[0])

    wait_until(lambda: recorded() > 20_000, "some of it is recorded", timeout_seconds=30)
    relay.process.kill()
    relay.process.wait()
    assert recorded() < 100_000
    start_relay()
    world.wait_until_confirmed(timeout_seconds=60)
    assert recorded() == 100_000
