"""Tracing, from outside: spans as a collector receives them."""

import gzip
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from acceptance.conftest import StartRelay
from support.observing import readyz_state
from support.waiting import wait_until
from support.world import World, headers_of

_TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
_SPAN_ID = "b7ad6b7169203331"
_TRACEPARENT = f"00-{_TRACE_ID}-{_SPAN_ID}-01"


@contextmanager
def collector() -> Iterator[tuple[str, list[Span]]]:
    """Its address for OTEL_EXPORTER_OTLP_ENDPOINT, and the spans that came."""
    spans: list[Span] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            request = ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing: it would mix with the tests' own output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", spans
    finally:
        server.shutdown()
        server.server_close()


def test_a_span_for_each_event_links_to_the_trace_that_wrote_it(world: World, start_relay: StartRelay) -> None:
    world.migrate()
    aggregate_type = world.create_topic()
    with collector() as (endpoint, spans):
        relay = start_relay(
            CDC_OUTBOX_TRACING__ENABLED="true", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, OTEL_BSP_SCHEDULE_DELAY="100"
        )
        traced = world.insert(aggregate_type, headers=f'{{"traceparent": "{_TRACEPARENT}"}}')
        untraced = world.insert(aggregate_type)
        records = {dict(headers_of(record))["id"]: record for record in world.read(aggregate_type, 2)}
        assert dict(headers_of(records[traced]))["traceparent"] == _TRACEPARENT
        wait_until(lambda: len(spans) == 2, "both spans")
        world.db.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s", [world.slot]
        )
        wait_until(lambda: relay.metric('cdc_outbox_reconnects_total{side="postgres"}') == 1, "it reconnects")
        wait_until(lambda: readyz_state(relay) == "streaming", "and streams again")
        relay.process.terminate()
        assert relay.process.wait(20) == 0
    of = {
        value.value.string_value: span
        for span in spans
        for value in span.attributes
        if value.key == "messaging.message.id"
    }
    (link,) = of[traced].links
    assert (link.trace_id.hex(), link.span_id.hex()) == (_TRACE_ID, _SPAN_ID)
    assert not of[untraced].links
    for event_id, span in of.items():
        assert span.name == f"send outbox.{aggregate_type}"
        assert span.kind == Span.SPAN_KIND_PRODUCER
        assert span.start_time_unix_nano == records[event_id].timestamp()[1] * 1_000_000  # the commit
        assert span.end_time_unix_nano > span.start_time_unix_nano


def test_without_its_extra_tracing_is_refused(world: World) -> None:
    """As in an installation without it: the libraries cannot be imported."""
    program = (
        "import sys; sys.modules['opentelemetry'] = None; sys.argv = ['cdc-outbox', 'run'];"
        "from cdc_outbox.cli.main import main; main()"
    )
    environment = {**world.environment, "CDC_OUTBOX_TRACING__ENABLED": "true"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "-m pip install " in done.stderr
    assert "[otel]" in done.stderr
