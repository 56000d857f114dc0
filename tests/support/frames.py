"""Frames as a server would send them, built by hand from the manual, independently of the code under test."""

import struct


def xlog_data(message: bytes, *, wal_end: int = 0) -> bytes:
    return b"w" + struct.pack("!QQq", wal_end, wal_end, 0) + message


def keepalive(wal_end: int, *, reply: bool = False) -> bytes:
    return b"k" + struct.pack("!QqB", wal_end, 0, reply)


def begin(commit_lsn: int, *, time_us: int = 0, xid: int = 7) -> bytes:
    return xlog_data(b"B" + struct.pack("!QqI", commit_lsn, time_us, xid))


def commit(commit_lsn: int, end_lsn: int, *, wal_end: int | None = None) -> bytes:
    return xlog_data(
        b"C" + struct.pack("!BQQq", 0, commit_lsn, end_lsn, 0), wal_end=end_lsn if wal_end is None else wal_end
    )


def relation(relation_id: int, name: str, columns: dict[str, int], *, namespace: str = "public") -> bytes:
    message = b"R" + struct.pack("!I", relation_id) + namespace.encode() + b"\0" + name.encode() + b"\0d"
    message += struct.pack("!H", len(columns))
    for column, type_oid in columns.items():
        message += b"\0" + column.encode() + b"\0" + struct.pack("!Ii", type_oid, -1)
    return xlog_data(message)


def insert(relation_id: int, values: list[bytes | None]) -> bytes:
    message = b"I" + struct.pack("!IcH", relation_id, b"N", len(values))
    for value in values:
        message += b"n" if value is None else b"t" + struct.pack("!I", len(value)) + value
    return xlog_data(message)
