"""A peer's process: started for one run, ended with it, its output kept for when it fails."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_STOP_SECONDS: Final = 20.0


@contextmanager
def running(command: Sequence[str | Path], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Ended by SIGTERM, or SIGKILL if that is not heard."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("CDC_OUTBOX_")}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            env={**inherited, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        except BaseException as error:
            output.seek(0)
            error.add_note(f"{command[0]} said: {output.read()[-2000:].decode(errors='replace')}")
            raise
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(_STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
