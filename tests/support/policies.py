"""Policies that the suites judge by, and what they ask of the command."""

import json
from pathlib import Path
from typing import Any

from support import command
from support.world import World

#: The one that the design shows.
EXAMPLE = b"""\
version   = 1
default   = "deny"                     # unknown types stay inside
initiator = "headers.initiator"
on_error  = { verdict = "approve", approvers = ["platform"] }

[[rule]]
id = "card-number"
when = { event_type = "customer.*", "payload.card.number" = { exists = true } }
verdict = "deny"
keep = "hash"                          # not stored again

[[rule]]
id = "replayed-effects"
when = { origin = ["replay", "redrive"], event_type = ["refund.*", "email.*"] }
verdict = "approve"
approvers = ["platform"]

[[rule]]
id = "deploy-window"
when = { event_type = "prod.deploy" }
unless = { commit_time = { days = "mon-thu", hours = "09:00-16:00", zone = "Europe/Berlin" } }
verdict = "deny"
then = "freeze"                        # or "skip", the default

[[rule]]
id = "big-refund"
when = { event_type = "refund.*", "payload.amount" = { gt = 500 } }
verdict = "approve"
approvers = ["finance"]
approvals = 2                          # never the initiator
expires = "4h"                         # then denied
show = ["payload.amount", "payload.customer"]

[[rule]]
id = "email-rate"
when = { event_type = "email.send" }
verdict = "throttle"
rate = "10/min"
by = ["headers.tenant"]
max_wait = "1h"                        # beyond: denied

[[rule]]
id = "huge"
mode = "watch"                         # counted, then on to the next rule
when = { payload_bytes = { gt = 200_000 } }
verdict = "deny"

[[rule]]
id = "known"
when = { aggregate_type = ["order", "refund", "email", "run"] }
verdict = "allow"
"""

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


def activate(world: World, file: Path, *arguments: str) -> command.Done:
    return command.run(world.environment, "policy", "activate", str(file), "--reason", "ticket 88", *arguments)


def denied(world: World) -> list[dict[str, Any]]:
    holds: list[dict[str, Any]] = json.loads(command.run(world.environment, "holds", "list", "--json").out)
    return holds[::-1]
