"""The stack that tests run against: PostgreSQL, Kafka and a relay, real ones. Needs the whole of cdc-outbox."""

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from cdc_outbox.demo.relay import RelayProcess
from cdc_outbox.demo.sandbox import make_sandbox, own_topics, unique_name
from cdc_outbox.demo.stack import servers
from cdc_outbox.inbox import schema
from cdc_outbox.postgres.connection import connect

POSTGRES_ENV: Final = "CDC_OUTBOX_TEST_POSTGRES_DSN"
KAFKA_ENV: Final = "CDC_OUTBOX_TEST_KAFKA_BOOTSTRAP_SERVERS"


@dataclass(frozen=True, slots=True)
class Stack:
    #: of a database with outbox and inbox; it is the relay's, the application's and the consumer's
    dsn: str
    bootstrap_servers: str
    #: host:port, for /readyz and /metrics
    relay_address: str
    _topic_template: str

    def topic(self, aggregate_type: str = "event") -> str:
        """To which the relay publishes events of this type."""
        return self._topic_template.format(aggregate_type=aggregate_type)


@contextmanager
def running_stack(settings: Mapping[str, str], folder: Path) -> Iterator[Stack]:
    """``settings`` are the relay's, on top of where it is; its log goes into ``folder``.

    Raises ConfigurationError if no server is to be had, CheckFailed if the relay does not start.
    """
    name = unique_name("cdc_outbox_test")
    settings = {"CDC_OUTBOX_KAFKA__TOPIC": f"{name}.{{aggregate_type}}", **settings}
    with (
        _ended_by_sigterm(),
        servers(os.environ.get(POSTGRES_ENV), os.environ.get(KAFKA_ENV)) as started,
        make_sandbox(started.dsn, started.bootstrap_servers, name, settings) as sandbox,
        own_topics(sandbox.bootstrap_servers, f"{name}."),
        RelayProcess(sandbox.environment, folder / "relay.log") as relay,
    ):
        with connect(sandbox.dsn) as connection:
            connection.execute(schema.sql().encode())
        relay.wait_until_ready()
        yield Stack(sandbox.dsn, sandbox.bootstrap_servers, relay.address, settings["CDC_OUTBOX_KAFKA__TOPIC"])


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """As by Ctrl-C: in order, with nothing left behind. Unless somebody handles that signal already."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    is_ours = (
        signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    )
    if is_ours:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
