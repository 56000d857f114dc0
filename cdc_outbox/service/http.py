"""HTTP: /healthz (the process lives), /readyz (it streams, or says why not), /metrics.

The server reads snapshots only.

Liveness never depends on Kafka or PostgreSQL: a restart of the relay would fix neither.
"""

import errno
import socket
import sys
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import orjson
from prometheus_client import CONTENT_TYPE_LATEST

from cdc_outbox.errors import ConfigurationError
from cdc_outbox.service.health import Health
from cdc_outbox.service.logs import get_logger
from cdc_outbox.service.metrics import Metrics

_RETRY_SECONDS: Final = 1.0
#: How long a client may keep us waiting for its next byte, or not take ours.
_CLIENT_SECONDS: Final = 5.0
#: How long a request may take, from the connection to the last byte of the answer.
_REQUEST_SECONDS: Final = 10.0


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)
        #: when each that is open was taken, monotonic seconds
        self._taken_at: dict[Any, float] = {}

    def process_request(self, request: Any, client_address: Any) -> None:
        self._taken_at[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._taken_at.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called twice a second. End what takes too long: a client that sends a byte every now and then."""
        oldest = time.monotonic() - _REQUEST_SECONDS
        for request, taken_at in list(self._taken_at.items()):
            if taken_at < oldest:
                with suppress(OSError):  # it has just ended by itself
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever hung up before the answer wants no answer; anything else is a defect of ours, and shown."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class HttpServer:
    """Serves in a thread of its own.

    A port that is taken is no reason not to carry events (it may be the leader's, on the same machine): the server says
    so once and goes on trying to get it.
    """

    def __init__(self, address: tuple[str, int], health: Health, metrics: Metrics) -> None:
        self._address = address
        self._health = health
        self._metrics = metrics
        self._log = get_logger()

    def start(self) -> None:
        """Raises ConfigurationError for an address that is not this machine's."""
        try:
            server: ThreadingHTTPServer | None = self._bind()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigurationError(f"http.listen = {self._shown}: {error.strerror or error}") from error
            server = None
            self._log.warning("http_address_in_use", listen=self._shown, hint="set http.listen to a free one")
        threading.Thread(target=self._serve, args=[server], name="http", daemon=True).start()

    @property
    def _shown(self) -> str:
        return f"{self._address[0]}:{self._address[1]}"

    def _serve(self, server: ThreadingHTTPServer | None) -> None:
        while server is None:
            time.sleep(_RETRY_SECONDS)
            try:
                server = self._bind()
            except OSError:
                continue
        self._log.info("http_listening", listen=self._shown)
        server.serve_forever()

    def _bind(self) -> ThreadingHTTPServer:
        health, metrics = self._health, self._metrics

        class Handler(BaseHTTPRequestHandler):
            timeout = _CLIENT_SECONDS
            server_version = "cdc-outbox"
            sys_version = ""

            def do_GET(self) -> None:
                if self.path == "/healthz":
                    self._send(HTTPStatus.OK, b"ok\n", "text/plain")
                elif self.path == "/readyz":
                    status = HTTPStatus.OK if health.ready else HTTPStatus.SERVICE_UNAVAILABLE
                    self._send(status, orjson.dumps(health.report()), "application/json")
                elif self.path == "/metrics":
                    self._send(HTTPStatus.OK, metrics.render(), CONTENT_TYPE_LATEST)
                else:
                    self._send(HTTPStatus.NOT_FOUND, b"/healthz, /readyz, /metrics\n", "text/plain")

            def _send(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is http.server's
                """Probes come every few seconds; they are not worth a line."""

        return _Server(self._address, Handler)
