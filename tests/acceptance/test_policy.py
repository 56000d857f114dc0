"""The policy's verbs, from outside."""

import hashlib
import json
from pathlib import Path
from typing import Any

import psycopg
import pytest

from acceptance.conftest import StartRelay
from cdc_outbox.relay.policy.binding import event_sha256
from cdc_outbox.relay.router import Record
from support import command
from support.observing import delivered_ids
from support.policies import EXAMPLE
from support.waiting import wait_until
from support.world import World


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


STRICT = b"""\
version = 1

[[rule]]
id = "card"
when = { event_type = "customer.*", "payload.card" = { exists = true } }
verdict = "deny"
keep = "hash"

[[rule]]
id = "small-refund"
when = { event_type = "refund.*", "payload.amount" = { le = 500 } }
verdict = "allow"

[[rule]]
id = "known"
when = { event_type = ["order.*", "customer.*"] }
verdict = "allow"
"""
OPEN = b'version = 1\ndefault = "allow"\n'
ASK = "INSERT INTO cdc_outbox.request (slot, kind, body, reason) VALUES (%s, 'policy', %s, 'r')"
FORGED = "INSERT INTO cdc_outbox.request (slot, kind, body, reason, principal) VALUES ('s', 'policy', '', '', 'boss')"


@pytest.fixture
def governed(world: World, tmp_path: Path) -> World:
    world.migrate()
    (tmp_path / "strict.toml").write_bytes(STRICT)
    (tmp_path / "open.toml").write_bytes(OPEN)
    return world


def activate(world: World, file: Path, *arguments: str) -> command.Done:
    return command.run(world.environment, "policy", "activate", str(file), "--reason", "ticket 88", *arguments)


def denied(world: World) -> list[dict[str, Any]]:
    holds: list[dict[str, Any]] = json.loads(command.run(world.environment, "holds", "list", "--json").out)
    return holds[::-1]


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


def test_a_policy_is_tried_on_the_rows_of_the_outbox(governed: World, tmp_path: Path, start_relay: StartRelay) -> None:
    world = governed
    candidate = tmp_path / "candidate.toml"
    mails = '[[rule]]\nid = "mails"\nwhen = { event_type = "mail.*" }\nverdict = "throttle"\nrate = "2/min"\n'
    candidate.write_text(STRICT.decode() + mails + 'by = ["headers.tenant"]\nmax_wait = "1m"\n')
    world.insert("a", event_type="order.new")
    refund = world.insert("a", event_type="refund.asked", payload='{"amount": 501}')
    world.insert("a", event_type="refund.asked", payload="[]")
    for tenant in ("x", "y"):
        for _ in range(5):
            world.insert("a", event_type="mail.send", headers=f'{{"tenant": "{tenant}"}}', created_at="2026-01-01")
    world.insert("no topic of that name", event_type="order.new")
    tried = json.loads(command.run(world.environment, "policy", "test", str(candidate), "--json").out)
    assert (tried["rows"], tried["unroutable"], tried["stricter"], tried["looser"]) == (14, 1, 12, 0)
    tallies = {(tally["rule"], tally["verdict"]): tally for tally in tried["rules"]}
    assert tallies["", "deny"]["samples"] == [refund]
    assert tallies["small-refund", "deny"]["errors"] == 1
    assert tallies["known", "allow"]["events"] == 1
    mails_tally = tallies["mails", "throttle"]
    assert (mails_tally["events"], mails_tally["waiting"], mails_tally["denied"]) == (10, 4, 2)
    assert mails_tally["longest_wait_seconds"] == 60
    shown = command.run(world.environment, "policy", "test", str(candidate))
    assert "14 rows: 12 stricter, 0 looser than no policy; 1 could never be published" in shown.out
    assert "mails: 4 would wait, 60 s at most; 2 would be denied" in shown.out
    # beside one in force
    start_relay(CDC_OUTBOX_RELAY__ON_POISON="dead-letter")
    assert activate(world, tmp_path / "strict.toml").exit_code == 0
    opened = command.run(world.environment, "policy", "test", str(tmp_path / "open.toml"), "--fail-on", "looser")
    assert opened.exit_code == 4
    assert "12 events are treated looser than now" in opened.error
    same = command.run(world.environment, "policy", "test", str(tmp_path / "strict.toml"), "--fail-on", "looser")
    assert (same.exit_code, "0 stricter, 0 looser than the policy in force" in same.out) == (0, True)


@pytest.mark.parametrize("kind", ["bytea", "text", "jsonb"])
@pytest.mark.rest
def test_a_trial_judges_every_kind_of_payload(world: World, tmp_path: Path, kind: str) -> None:
    world.db.execute(
        f"CREATE TABLE events (key text, id int, what text, body {kind});"
        """INSERT INTO events VALUES ('k', 1, 'refund', '{"amount": 501}'), ('k', 2, NULL, '{"amount": 1}')"""
    )
    world.settings |= {
        "CDC_OUTBOX_OUTBOX__TABLE": "events",
        "CDC_OUTBOX_OUTBOX__COLUMNS": '{"aggregate_id": "key", "event_type": "what", "payload": "body"}',
        "CDC_OUTBOX_KAFKA__TOPIC": "events",
    }
    file = tmp_path / "policy.toml"
    file.write_text('version = 1\n[[rule]]\nid = "r"\nwhen = { "payload.amount" = { gt = 500 } }\nverdict = "allow"\n')
    tried = json.loads(command.run(world.environment, "policy", "test", str(file), "--json").out)
    assert [(tally["rule"], tally["samples"]) for tally in tried["rules"]] == [("r", ["1"]), ("", ["2"])]


def test_an_event_is_explained(governed: World, tmp_path: Path, start_relay: StartRelay) -> None:
    world = governed
    event_id = world.insert("a", event_type="refund.asked", payload='{"amount": "620"}')
    file = tmp_path / "strict.toml"
    assert command.run(world.environment, "policy", "explain", event_id).exit_code == 2, "none is in force"
    told = command.run(world.environment, "policy", "explain", event_id, "--file", str(file))
    assert told.out.splitlines() == [
        "3: rule card does not match",
        '     no  when event_type = "customer.*"',
        '     no  when payload.card = {"exists":true}',
        "9: rule small-refund cannot be evaluated: deny (on_error)",
        '    yes  when event_type = "refund.*"',
        '      ?  when payload.amount = {"le":500}',
    ]
    start_relay(CDC_OUTBOX_KAFKA__CREATE_TOPICS="true")
    assert activate(world, file).exit_code == 0
    world.wait_until_confirmed()
    other = world.insert("a", event_type="x")
    said = command.run(world.environment, "policy", "explain", other).out
    assert said.endswith("no rule decides: deny\n")
    told_json = json.loads(command.run(world.environment, "policy", "explain", event_id, "--json").out)
    assert [rule["matches"] for rule in told_json["rules"]] == [False, None]
    missing = command.run(world.environment, "policy", "explain", "no such id")
    assert (missing.exit_code, "is not in public.outbox" in missing.error) == (2, True)
