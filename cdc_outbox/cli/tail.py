"""`cdc-outbox tail`: events as they commit. The relay's own pipeline, with a delivery that prints."""

import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from typing import Final

import click
import orjson

from cdc_outbox.cli.main import Settings
from cdc_outbox.cli.terminal import printable
from cdc_outbox.errors import BrokenInvariant, CdcOutboxError
from cdc_outbox.journal.journal import NoJournal
from cdc_outbox.postgres.connection import connect_bounded
from cdc_outbox.postgres.server import check_same_server
from cdc_outbox.postgres.stream import ReplicationStream
from cdc_outbox.relay.headers import Headers
from cdc_outbox.relay.pipeline import Pipeline
from cdc_outbox.relay.topic_template import TopicTemplate
from cdc_outbox.relay.watermark import Batch
from cdc_outbox.service.health import Health
from cdc_outbox.service.metrics import Metrics
from cdc_outbox.service.parking import Parker
from cdc_outbox.service.preflight import prepare_route
from cdc_outbox.service.session import Session
from cdc_outbox.service.shutdown import Shutdown, ShutdownRequested

_SHUTDOWN_SECONDS: Final = 5.0
#: A slot can begin only when the transactions that are open have ended: how long each may take.
_SLOT_SECONDS: Final = 30


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object per event and line.")
@click.pass_obj
def command(settings: Settings, *, as_json: bool) -> None:
    """Print events as they commit, until Ctrl-C.

    Reads through a temporary slot that vanishes with the connection; the real slot is not touched. It begins when the
    transactions that are open have ended.
    """
    config = settings.config
    topic = TopicTemplate(config.kafka.topic, config.kafka.topic_pattern)
    shutdown = Shutdown(_SHUTDOWN_SECONDS)
    shutdown.install()
    dsn = config.postgres.dsn.get_secret_value()
    slot = f"cdc_outbox_tail_{os.getpid()}"
    try:
        with ExitStack() as stack:
            with shutdown.interrupting():
                stream = stack.enter_context(ReplicationStream(dsn))
                with closing(connect_bounded(dsn, application_name="cdc-outbox tail")) as connection:
                    check_same_server(connection, stream.identify())
                    route = prepare_route(config, connection, topic)
                stream.create_temporary_slot(slot, lock_timeout_seconds=_SLOT_SECONDS)
                stream.start(slot, config.postgres.publication)
            metrics, printer = Metrics(), _Printer(as_json=as_json)
            Session(
                stream,
                printer,
                Pipeline(route.routing, printer),
                Parker(NoJournal(), metrics, keeps=False),
                lambda _topic: None,
                shutdown,
                Health(slot, metrics),
            ).run()
    except (ShutdownRequested, BrokenPipeError):  # `tail | head`: the reader has what it wanted
        return


class _NeverRaised(Exception):
    """Printing refuses no event."""


class _Printer:
    """Stands where Kafka's delivery stands; an event is delivered when it is printed."""

    refusal: type[Exception] = _NeverRaised
    unreachable: str | None = None
    in_flight = 0

    def __init__(self, *, as_json: bool) -> None:
        self._line = _json_line if as_json else _text_line

    def publish(
        self,
        topic: str,
        value: bytes | None,
        key: bytes,
        _partition: int,
        on_delivery: Callable[[None, None], None],
        _: None,
        timestamp_ms: int,
        headers: Headers,
    ) -> None:
        click.echo(self._line(topic, value, key, timestamp_ms, headers))
        on_delivery(None, None)

    def close_batch(self, batch: Batch) -> None:
        """Nothing is to be done."""

    def poll(self, timeout_seconds: float) -> None:
        """Nothing is ever in flight."""

    def flush(self, timeout_seconds: float) -> None:
        """Nothing is ever in flight."""

    def probe(self) -> None:
        """Nothing is ever unreachable."""

    def publish_in_batches(self) -> None:
        """It never does."""

    def explain(self, refusal: object, topic: str) -> CdcOutboxError:  # noqa: ARG002
        return BrokenInvariant(f"printing refused an event: {refusal!r}")

    def on_failure(self, error: object, message: object) -> None:  # noqa: ARG002
        raise BrokenInvariant(f"printing failed: {error!r}")


def _text_line(topic: str, value: bytes | None, key: bytes, timestamp_ms: int, headers: Headers) -> str:
    when = datetime.fromtimestamp(timestamp_ms / 1000, UTC).isoformat(timespec="milliseconds")
    shown = printable(" ".join(f"{name}={_text(content)}" for name, content in headers))
    key_shown = click.style(printable(_text(key)), bold=True)
    return f"{when} {click.style(topic, fg='cyan')} {key_shown} {shown} {printable(_text(value))}"


def _json_line(topic: str, value: bytes | None, key: bytes, timestamp_ms: int, headers: Headers) -> bytes:
    return orjson.dumps(
        {
            "topic": topic,
            "key": _text(key),
            "timestamp_ms": timestamp_ms,
            "headers": {name: None if content is None else _text(content) for name, content in headers},
            "value": None if value is None else _text(value),
        }
    )


def _text(content: bytes | None) -> str:
    return "(null)" if content is None else content.decode(errors="backslashreplace")
