"""Event names in logs are a contract: what filters and alerts on them must not break unseen."""

import ast
from pathlib import Path

import cdc_outbox

EVENTS = {
    "dead_lettered",
    "monitor_failed",
    "no_canary",
    "not_confirmed",
    "failed",
    "gaps_not_noticed",
    "http_address_in_use",
    "http_listening",
    "library",
    "publication_wasteful",
    "redrive_passed_over",
    "redrive_refused",
    "redriving",
    "refused_only_together",
    "shutdown_deadline_passed",
    "slot_not_seen",
    "policy_in_force",
    "policy_refused",
    "stopped",
    # changes of state
    "starting",
    "streaming",
    "standby",
    "waiting",
}
_LEVELS = {"debug", "info", "warning", "error"}


def logged() -> set[str]:
    """Every literal that is logged as an event, in all of the package but what runs in applications."""
    names, package = set(), Path(cdc_outbox.__file__).parent
    for path in set(package.rglob("*.py")) - set((package / "inbox").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in _LEVELS
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                names.add(str(node.args[0].value))
    return names


def test_event_names_are_stable() -> None:
    assert logged() <= EVENTS
    assert EVENTS - logged() == {"starting", "streaming", "standby", "waiting"}
