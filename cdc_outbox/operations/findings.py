"""Findings: what `cdc-outbox doctor` says of one thing it looked at."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from cdc_outbox.errors import CdcOutboxError

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """``hint`` is the exact command or setting that fixes it; empty if there is nothing to fix."""

    check: str
    state: State
    found: str
    hint: str = ""


def checked(check: str, look: Callable[[], str], *, hint: str = "") -> Finding:
    """What ``look`` returns is fine; an error of ours that it raises is what failed; ``hint`` if it has none."""
    try:
        return Finding(check, "ok", look())
    except CdcOutboxError as error:
        return Finding(check, "failed", error.message, error.hint or hint)


#: Several findings, told as they are made.
Findings = Iterator[Finding]
