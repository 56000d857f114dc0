"""Tracing: a span for each event, from its commit to Kafka's acknowledgement, linked to the trace that wrote the row.

While a refused event is looked for (`kafka.isolation`), each attempt to send one is a span.

Off by default, and then this module is not even imported. It costs a multiple of what the relay does for an event
(deploy/operating.md, "Watching it"); OTEL_TRACES_SAMPLER thins out the spans, not all of the cost. Where they go is
OpenTelemetry's own configuration (OTEL_EXPORTER_OTLP_ENDPOINT, ...). The row's traceparent travels on as a header,
untouched.
Source: OpenTelemetry, "Semantic conventions for Kafka"; W3C, "Trace Context".
"""

from collections.abc import Callable
from typing import Any, Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, SpanKind, Status, StatusCode, Tracer, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cdc_outbox import __version__
from cdc_outbox.kafka.opening import Produce

_TRACE_HEADERS: Final = ("traceparent", "tracestate")
_ID_HEADERS: Final = ("id", "ce_id")
_NS_PER_MS: Final = 1_000_000
_PROPAGATOR: Final = TraceContextTextMapPropagator()


def start_tracing() -> TracerProvider:
    """Spans are sent in batches from a thread of the provider's; ``shutdown`` sends the last ones."""
    provider = TracerProvider(resource=Resource.create({"service.name": "cdc-outbox", "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def traced(provider: TracerProvider) -> Callable[[Produce], Produce]:
    """Wraps Producer.produce: each call opens a span, and the delivery report ends it."""
    tracer = provider.get_tracer("cdc-outbox", __version__)

    def wrap(produce: Produce) -> Produce:
        return _Traced(tracer, produce).produce

    return wrap


class _Traced:
    def __init__(self, tracer: Tracer, produce: Produce) -> None:
        self._tracer = tracer
        self._produce = produce

    def produce(
        self,
        topic: str,
        value: bytes | None,
        key: bytes,
        partition: int,
        on_delivery: Callable[[Any, Any], None],
        _: None,
        timestamp_ms: int,
        headers: list[tuple[str, bytes | None]],
    ) -> None:
        span = self._tracer.start_span(
            f"send {topic}",
            kind=SpanKind.PRODUCER,
            start_time=timestamp_ms * _NS_PER_MS,
            links=_links(headers),
            attributes={
                "messaging.system": "kafka",
                "messaging.operation.type": "send",
                "messaging.destination.name": topic,
                "messaging.message.id": _id_of(headers),
            },
        )

        def delivered(error: Any, message: Any) -> None:
            if error is not None:
                span.set_status(Status(StatusCode.ERROR, str(error)))
            span.end()
            on_delivery(error, message)

        try:
            self._produce(topic, value, key, partition, delivered, None, timestamp_ms, headers)
        except BaseException as error:  # whatever it is: of this attempt there is no report to come
            span.set_status(Status(StatusCode.ERROR, str(error)))
            span.end()
            raise


def _id_of(headers: list[tuple[str, bytes | None]]) -> str:
    return next((value.decode(errors="replace") for name, value in headers if name in _ID_HEADERS and value), "")


def _links(headers: list[tuple[str, bytes | None]]) -> list[Link]:
    """To the trace in which the row was written, if it says so."""
    carrier = {name: value.decode(errors="replace") for name, value in headers if name in _TRACE_HEADERS and value}
    if not carrier:
        return []
    context = get_current_span(_PROPAGATOR.extract(carrier)).get_span_context()
    return [Link(context)] if context.is_valid else []
