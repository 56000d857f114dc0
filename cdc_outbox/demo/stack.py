"""A temporary folder for servers, and both servers in one: what tests and benchmarks take when nothing else is given."""

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cdc_outbox.demo.kafka import EmbeddedKafka, fetch_kafka
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
