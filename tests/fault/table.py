"""The table of outcomes in tests/README.md, written by the suite itself."""

import os
import platform
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fault.stage import Outcome

_README: Final = Path(__file__).parents[1] / "README.md"
_BEGIN: Final = "<!-- written by pytest -m fault --write-table -->\n"
_END: Final = "<!-- end -->\n"
_HEAD: Final = (
    "fault", "runs", "events", "lost", "reordered", "duplicates, median", "max", "detected, s", "recovered, s",
)  # fmt: skip


def write(outcomes: Sequence[Outcome]) -> None:
    """Put ``outcomes`` into the README; those of one fault share a line."""
    by_fault: defaultdict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_fault[outcome.fault].append(outcome)
    lines = [" | ".join(_HEAD), " | ".join(["---", *["--:"] * (len(_HEAD) - 1)])]
    lines += [" | ".join(_together(these).cells()) for _, these in sorted(by_fault.items())]
    table = "".join(f"| {line} |\n" for line in lines)
    head, _, rest = _README.read_text().partition(_BEGIN)
    _README.write_text(f"{head}{_BEGIN}\n{_conditions()}\n\n{table}\n{_END}{rest.partition(_END)[2]}")


def _together(outcomes: list[Outcome]) -> Outcome:
    return outcomes[0]


def _conditions() -> str:
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, on top of {revision.stdout.strip() or '?'}, {os.cpu_count()} cores that "
        f"PostgreSQL, Kafka, writer, observer and relay share, Python {platform.python_version()}. "
        "Seconds are the worst of all runs."
    )
