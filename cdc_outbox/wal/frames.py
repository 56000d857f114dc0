"""Copy-both frames: the envelopes in which the walsender and we talk during START_REPLICATION.

Only bytes in, values out: no socket, no pgoutput (the message inside an XLogData frame is pgoutput.py's).
Source: PostgreSQL manual, "Streaming Replication Protocol".
"""

import struct
from typing import Final, NamedTuple

from cdc_outbox.errors import MalformedStream

XLOG_DATA: Final = ord("w")
KEEPALIVE: Final = ord("k")

#: An XLogData frame: 'w', start of WAL data, end of WAL on the server, server clock; the message follows.
MESSAGE_START: Final = 25

#: The server counts microseconds from here: 2000-01-01 in Unix seconds.
POSTGRES_EPOCH_SECONDS: Final = 946_684_800

_KEEPALIVE = struct.Struct("!xQq?")
_STATUS_UPDATE = struct.Struct("!cQQQq?")


class Keepalive(NamedTuple):
    wal_end: int
    reply_requested: bool


def read_keepalive(frame: bytes) -> Keepalive:
    """Primary keepalive: 'k' · wal end int64 · server clock int64 (µs) · reply requested byte.

    Raises MalformedStream for any other frame.
    """
    if len(frame) != _KEEPALIVE.size or frame[0] != KEEPALIVE:
        raise MalformedStream(f"unknown copy-both frame {frame[:1]!r} of {len(frame)} bytes")
    wal_end, _, reply_requested = _KEEPALIVE.unpack(frame)
    return Keepalive(wal_end, reply_requested)


def standby_status_update(confirmed_lsn: int, *, unix_seconds: float, request_reply: bool = False) -> bytes:
    """Standby status update: 'r' · written · flushed · applied LSN · our clock · reply requested.

    The three LSNs are one for us: what is confirmed is written, flushed and applied.
    """
    clock = int((unix_seconds - POSTGRES_EPOCH_SECONDS) * 1_000_000)
    return _STATUS_UPDATE.pack(b"r", confirmed_lsn, confirmed_lsn, confirmed_lsn, clock, request_reply)
