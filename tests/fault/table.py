"""The table of outcomes in tests/README.md, written by the suite itself."""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fault.stage import Outcome, Refusal

_README: Final = Path(__file__).parents[1] / "README.md"
_BEGIN: Final = "<!-- written by pytest -m fault --write-table -->\n"
_END: Final = "<!-- end -->\n"
_HEAD: Final = (
    "fault", "runs", "events", "lost", "reordered", "duplicates, median", "max", "detected, s", "recovered, s",
)  # fmt: skip


def write(outcomes: Sequence[Outcome], refusals: Sequence[Refusal]) -> None:
    """Put both tables into the README."""
    recovered = [outcome.cells() for outcome in sorted(outcomes, key=lambda outcome: outcome.fault)]
    refused = [[refusal.fault, f"{refusal.seconds:.1f}"] for refusal in sorted(refusals, key=lambda it: it.fault)]
    head, _, rest = _README.read_text().partition(_BEGIN)
    _README.write_text(
        f"{head}{_BEGIN}\n{_conditions()}\n\n{_table(_HEAD, recovered)}\n"
        f"What the relay must not get over by itself: it ends with exit 3, a reason and a hint.\n\n"
        f"{_table(('fault', 'ended after, s'), refused)}\n{_END}{rest.partition(_END)[2]}"
    )


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruler = ["---", *["--:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ruler, *lines))


def _conditions() -> str:
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, on top of {revision.stdout.strip() or '?'}, {os.cpu_count()} cores that "
        f"PostgreSQL, Kafka, writer, observer and relay share, Python {platform.python_version()}. "
        "Seconds are the worst of all runs."
    )
