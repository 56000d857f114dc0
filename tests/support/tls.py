"""PostgreSQL behind TLS: a proxy that speaks it for a server that was built without, and a CA to trust or not.

A client's part of TLS (libpq's sslmode, sslrootcert, the host's name) is the same against either.
Source: PostgreSQL manual, "Message Flow", SSL Session Encryption.
"""

import asyncio
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trustme

_SSL_REQUEST: Final = struct.pack("!II", 8, 80877103)


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files of one CA: its own certificate, and a server's for 127.0.0.1."""

    ca: Path
    certificate: Path
    key: Path


def make_certificates(folder: Path, *, host: str = "127.0.0.1") -> Certificates:
    authority = trustme.CA()
    issued = authority.issue_cert(host)
    files = Certificates(folder / "ca.pem", folder / "server.crt", folder / "server.key")
    authority.cert_pem.write_to_path(str(files.ca))
    files.certificate.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(files.key))
    return files


@contextmanager
def tls_in_front_of(target_port: int, certificates: Certificates) -> Iterator[int]:
    """The port at which the server at ``target_port`` can be reached by TLS, and not without."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.certificate, certificates.key)

    async def serve(client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while await client_reader.readexactly(8) != _SSL_REQUEST:
                client.write(b"N")  # it offers to encrypt by GSSAPI first
            client.write(b"S")
            await client.start_tls(context)
            server_reader, server = await asyncio.open_connection("127.0.0.1", target_port)
            await asyncio.gather(_pump(client_reader, server), _pump(server_reader, client))

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    listener = asyncio.run_coroutine_threadsafe(asyncio.start_server(serve, "127.0.0.1", 0), loop).result()
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(_end(listener), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while piece := await reader.read(65_536):
            writer.write(piece)
            await writer.drain()
    finally:
        writer.close()


async def _end(listener: asyncio.Server) -> None:
    listener.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
