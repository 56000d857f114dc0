"""The embedded stack: PostgreSQL and Kafka in a temporary folder, started side by side, gone without a trace.

The demo plays on it; tests and benchmarks take it when they were given no addresses.
"""

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cdc_outbox.demo.kafka import EmbeddedKafka
from cdc_outbox.demo.postgres import EmbeddedPostgres


@contextmanager
def server_folder() -> Iterator[Path]:
    """A folder that other accounts may enter (PostgreSQL does not run as root), gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="cdc-outbox-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def running(*servers: EmbeddedPostgres | EmbeddedKafka) -> Iterator[None]:
    """All ``servers`` are up inside, whatever happens none is left afterwards."""
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
        with ThreadPoolExecutor() as pool:
            for started in [pool.submit(server.start) for server in servers]:
                started.result()
        yield
