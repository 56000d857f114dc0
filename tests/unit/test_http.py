"""Asking a relay of its readiness; the server's own side is tried in acceptance/."""

import socket
import threading

import pytest

from cdc_outbox.service.http import ask_readyz


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
