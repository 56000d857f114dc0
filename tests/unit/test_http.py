"""Asking a relay of its readiness, and how long the server lets others ask; what it answers is in acceptance/."""

import socket
import threading
import time

import pytest

from cdc_outbox.demo.ports import free_port
from cdc_outbox.service import http
from cdc_outbox.service.health import Health
from cdc_outbox.service.metrics import Metrics
from cdc_outbox.service.readiness import ask_readyz
from support.waiting import wait_until


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"?\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{",
        b"HTTP/1.1 503 Not Now\r\nContent-Length: 9\r\n\r\n{",
        b"HTTP/1.0 200 OK\r\n\r\nnope",
    ],
)
def test_a_relay_that_ends_while_it_answers_has_not_answered(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        assert ask_readyz(f"127.0.0.1:{server.getsockname()[1]}", timeout_seconds=2) is None
        thread.join()


def test_a_client_that_sends_a_byte_now_and_then_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_REQUEST_SECONDS", 1.0)
    metrics, address = Metrics(), ("127.0.0.1", free_port())
    http.HttpServer(address, Health("s", metrics), metrics).start()
    report = wait_until(lambda: ask_readyz(f"{address[0]}:{address[1]}", timeout_seconds=2), "an answer")
    assert report
    assert report["state"] == "starting"
    with socket.create_connection(address) as slow:
        began = time.monotonic()
        slow.settimeout(0.2)
        while True:
            assert time.monotonic() - began < 10, "it is still listened to"
            try:
                slow.sendall(b"G")
                if slow.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
    assert time.monotonic() - began > 0.9
