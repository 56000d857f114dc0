"""The embedded stack: PostgreSQL and Kafka in a temporary folder, started side by side, gone without a trace."""

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from cdc_outbox.demo.kafka import EmbeddedKafka, Progress, fetch_kafka, no_progress
from cdc_outbox.demo.postgres import EmbeddedPostgres


class EmbeddedStack:
    """Both servers up inside the ``with``; afterwards neither processes nor files are left."""

    def __init__(self, progress: Progress = no_progress) -> None:
        self._progress = progress
        self.folder = Path(tempfile.mkdtemp(prefix="cdc-outbox-"))
        self.folder.chmod(0o755)  # PostgreSQL may run under another account than ours

    def __enter__(self) -> Self:
        try:
            self.postgres = EmbeddedPostgres(self.folder / "postgres")
            self.kafka = EmbeddedKafka(self.folder / "kafka", fetch_kafka(self._progress))
            with ThreadPoolExecutor() as pool:
                for start in [pool.submit(self.postgres.start), pool.submit(self.kafka.start)]:
                    start.result()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for server in ("kafka", "postgres"):
            if hasattr(self, server):
                getattr(self, server).stop()
        shutil.rmtree(self.folder, ignore_errors=True)
