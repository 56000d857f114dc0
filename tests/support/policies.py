"""The policy that the design shows, and that the suites judge by."""

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
