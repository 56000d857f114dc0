"""pg_recvlogical to /dev/null: PostgreSQL's own client, which decodes nothing and publishes nothing. The floor."""

import shutil
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.lane import Lane
from benchmarks.peers import Unavailable
from benchmarks.peers.process import running


class RecvLogical:
    name = "pg_recvlogical"
    uses_slot = True
    publishes = False

    def prepare(self, lane: Lane) -> None:
        """Nothing."""

    def start(self, lane: Lane) -> AbstractContextManager[subprocess.Popen[bytes]]:
        program = lane.arena.programs / "pg_recvlogical" if lane.arena.programs else shutil.which("pg_recvlogical")
        if program is None or not Path(program).exists():
            raise Unavailable("pg_recvlogical is not in PATH")
        options = ["proto_version=1", "publication_names=cdc_outbox"]
        return running(
            [program, "-d", lane.dsn, "--slot", lane.slot, "--start", "-f", "/dev/null", f"--endpos={lane.end}"]
            + [argument for option in options for argument in ("-o", option)],
            {},
        )

    def has_finished(self, lane: Lane, process: subprocess.Popen[bytes], events: int) -> bool:
        return process.poll() == 0  # it ends by itself at --endpos
