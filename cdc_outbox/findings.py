"""Findings: what `cdc-outbox doctor` says of one thing it looked at."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from cdc_outbox.errors import CdcOutboxError

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """``mend`` is the exact command or setting that mends it; empty if there is nothing to mend."""

    check: str
    state: State
    found: str
    mend: str = ""


def looked_at(check: str, examine: Callable[[], str], *, mend: str = "") -> Finding:
    """What ``examine`` returns is fine; an error of ours that it raises is what failed; ``mend`` if it has no hint."""
    try:
        return Finding(check, "ok", examine())
    except CdcOutboxError as error:
        return Finding(check, "failed", error.message, error.hint or mend)


#: Several findings, told as they are made.
Findings = Iterator[Finding]
