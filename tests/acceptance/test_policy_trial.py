"""`policy test` and `policy explain`: what a policy would say, before anybody activates it."""

import json
from pathlib import Path

import pytest

from acceptance.conftest import StartRelay
from support import command
from support.policies import STRICT, activate
from support.world import World

EVENTS_TABLE = {
    "CDC_OUTBOX_OUTBOX__TABLE": "events",
    "CDC_OUTBOX_OUTBOX__COLUMNS": '{"aggregate_id": "key", "event_type": "what", "payload": "body"}',
    "CDC_OUTBOX_KAFKA__TOPIC": "events",
}


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
    world.insert("no topic of that name", event_type="refund.asked", payload='{"amount": 900}')
    tried = json.loads(command.run(world.environment, "policy", "test", str(candidate), "--json").out)
    assert (tried["rows"], tried["unroutable"], tried["stricter"], tried["looser"]) == (15, 1, 13, 0)
    tallies = {(tally["rule"], tally["verdict"]): tally for tally in tried["rules"]}
    assert tallies["", "deny"]["samples"][0] == refund
    assert tallies["", "deny"]["events"] == 2, "also what no topic can take"
    assert tallies["small-refund", "deny"]["errors"] == 1
    assert tallies["known", "allow"]["events"] == 1
    mails_tally = tallies["mails", "throttle"]
    assert (mails_tally["events"], mails_tally["waiting"], mails_tally["denied"]) == (10, 4, 2)
    assert mails_tally["longest_wait_seconds"] == 60
    shown = command.run(world.environment, "policy", "test", str(candidate))
    assert "15 rows: 13 stricter, 0 looser than no policy; 1 could never be published" in shown.out
    assert "mails: 4 would wait, 60 s at most; 2 would be denied" in shown.out
    # beside one in force
    start_relay(CDC_OUTBOX_RELAY__ON_POISON="dead-letter")
    assert activate(world, tmp_path / "strict.toml").exit_code == 0
    opened = command.run(world.environment, "policy", "test", str(tmp_path / "open.toml"), "--fail-on", "looser")
    assert opened.exit_code == 4
    assert "12 events are treated looser than now" in opened.error
    same = command.run(world.environment, "policy", "test", str(tmp_path / "strict.toml"), "--fail-on", "looser")
    assert (same.exit_code, "0 stricter, 0 looser than the policy in force" in same.out) == (0, True)


def test_a_trial_sees_what_the_log_has(world: World, tmp_path: Path) -> None:
    """A char(n) is padded there, and a rule for the bare text does not match."""
    world.db.execute(
        "CREATE TABLE events (key text, id int, what char(10), body json);"
        "INSERT INTO events VALUES ('k', 1, 'refund', '{}')"
    )
    world.settings |= EVENTS_TABLE
    file = tmp_path / "policy.toml"
    file.write_text('version = 1\n[[rule]]\nid = "r"\nwhen = { event_type = "refund" }\nverdict = "allow"\n')
    tried = json.loads(command.run(world.environment, "policy", "test", str(file), "--json").out)
    assert [tally["rule"] for tally in tried["rules"]] == [""]


@pytest.mark.parametrize("kind", ["bytea", "text", "jsonb"])
@pytest.mark.rest
def test_a_trial_judges_every_kind_of_payload(world: World, tmp_path: Path, kind: str) -> None:
    world.db.execute(
        f"CREATE TABLE events (key text, id int, what text, body {kind});"
        """INSERT INTO events VALUES ('k', 1, 'refund', '{"amount": 501}'), ('k', 2, NULL, '{"amount": 1}')"""
    )
    world.settings |= EVENTS_TABLE
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
