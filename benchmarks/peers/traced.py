"""cdc-outbox with a span for each event, sent to a collector that throws them away: what tracing costs."""

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

from benchmarks.lane import Lane
from benchmarks.peers.relay import Relay


class Traced(Relay):
    name = "cdc-outbox traced"
    sampled: ClassVar = {"OTEL_TRACES_SAMPLER": "always_on"}

    @contextmanager
    def start(self, lane: Lane) -> Iterator[subprocess.Popen[bytes]]:
        collector = ThreadingHTTPServer(("127.0.0.1", 0), _Collector)
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        self._endpoint = f"http://127.0.0.1:{collector.server_port}"
        try:
            with super().start(lane) as process:
                yield process
        finally:
            collector.shutdown()
            collector.server_close()

    def environment(self, lane: Lane) -> dict[str, str]:
        tracing = {"CDC_OUTBOX_TRACING__ENABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": self._endpoint}
        return {**super().environment(lane), **tracing, **self.sampled}


class TracedSampled(Traced):
    name = "cdc-outbox traced 1 %"
    sampled: ClassVar = {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.01"}


class _Collector(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""
