"""The installed command, as a user runs it."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROGRAM = Path(sys.executable).with_name("cdc-outbox")


@dataclass
class Done:
    exit_code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a failure prints."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("CDC_OUTBOX_")}
    return {**inherited, **settings}


def run(settings: Mapping[str, str], *arguments: str, timeout_seconds: float = 60) -> Done:
    done = subprocess.run(
        [PROGRAM, *arguments],
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def start(settings: Mapping[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [PROGRAM, *arguments],
        env=environment(settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
