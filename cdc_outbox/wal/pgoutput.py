"""pgoutput, protocol version 1, text format: the messages inside XLogData frames.

Pure: bytes in, values out. Readers take the *whole* frame (the message starts at byte 25), because copying the message
out first would cost an allocation per event. Anything that does not have the exact documented shape raises
MalformedStream; arbitrary bytes give a value or that error, nothing else.
Source: PostgreSQL manual, "Logical Replication Message Formats".
"""

import re
import struct
from dataclasses import dataclass
from typing import Final

from cdc_outbox.errors import MalformedStream
from cdc_outbox.wal.encodings import UTF8, Encoding
from cdc_outbox.wal.frames import MESSAGE_START, POSTGRES_EPOCH_SECONDS
from cdc_outbox.wal.lsn import LSN

BEGIN: Final = ord("B")
COMMIT: Final = ord("C")
INSERT: Final = ord("I")
RELATION: Final = ord("R")

#: Messages that carry no event: Origin, Type, logical Message, and the changes an outbox does not publish
#: (Update, Delete, Truncate: cleaning up is the application's business).
WITHOUT_EVENT: Final = frozenset(map(ord, "OYMUDT"))

#: Where an Insert's identifying head lies: tag, relation id, 'N', number of columns. It is the same for every row of a
#: relation, so one dictionary look-up of these bytes recognises the message, finds its relation and checks its shape.
INSERT_HEAD: Final = slice(MESSAGE_START, MESSAGE_START + 8)

_BEGIN = struct.Struct("!25xxQq4x")
_COMMIT = struct.Struct("!9xQ8xxxQQ8x")
_PLAIN_NAME: Final = re.compile("[a-z_][a-z0-9_]*")
_EPOCH_MS: Final = POSTGRES_EPOCH_SECONDS * 1000
_LENGTH = struct.Struct("!I").unpack_from
_HEAD = struct.Struct("!BIBH")


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    type_oid: int


@dataclass(frozen=True, slots=True)
class Relation:
    id: int
    namespace: str
    name: str
    columns: tuple[Column, ...]

    @property
    def insert_head(self) -> bytes:
        """The bytes at INSERT_HEAD of every Insert into this relation."""
        return _HEAD.pack(INSERT, self.id, ord("N"), len(self.columns))

    @property
    def as_in_sql(self) -> str:
        """The name, quoted where SQL would quote."""
        parts = (self.namespace, self.name)
        quoted = (part if _PLAIN_NAME.fullmatch(part) else '"' + part.replace('"', '""') + '"' for part in parts)
        return ".".join(quoted)

    def __str__(self) -> str:
        return f"{self.namespace}.{self.name}"


def read_begin(frame: bytes) -> tuple[int, int]:
    """Commit LSN, and commit time in Unix milliseconds.

    'B' · commit LSN int64 · commit time int64 (µs since 2000) · xid int32.
    """
    if len(frame) != _BEGIN.size:
        raise MalformedStream(f"Begin of {len(frame)} bytes, expected {_BEGIN.size}")
    commit_lsn, commit_time_us = _BEGIN.unpack(frame)
    return commit_lsn, commit_time_us // 1000 + _EPOCH_MS


def read_commit(frame: bytes) -> tuple[int, int, int]:
    """The server's WAL end as the frame around the message has it, commit LSN, end LSN.

    'C' · flags int8 · commit LSN int64 · end LSN int64 · commit time int64. The three are checked against each other:
    PostgreSQL would take an LSN from beyond what it has sent as confirmed, without a word.
    """
    if len(frame) != _COMMIT.size:
        raise MalformedStream(f"Commit of {len(frame)} bytes, expected {_COMMIT.size}")
    wal_end, commit_lsn, end_lsn = _COMMIT.unpack(frame)
    if not commit_lsn < end_lsn <= wal_end:
        raise MalformedStream(
            f"Commit at {LSN(commit_lsn)} claims to end at {LSN(end_lsn)}, the server is at {LSN(wal_end)}"
        )
    return wal_end, commit_lsn, end_lsn


def read_relation(frame: bytes, encoding: Encoding = UTF8) -> Relation:
    """'R' · id int32 · namespace cstring · name cstring · replica identity int8 · count int16 · columns.

    A column: flags int8 · name cstring · type oid int32 · type modifier int32.
    """
    try:
        relation_id = _LENGTH(frame, MESSAGE_START + 1)[0]
        namespace, at = _cstring(frame, MESSAGE_START + 5, encoding)
        name, at = _cstring(frame, at, encoding)
        (count,) = struct.unpack_from("!xH", frame, at)
        at += 3
        columns = []
        for _ in range(count):
            column, at = _cstring(frame, at + 1, encoding)
            (type_oid,) = struct.unpack_from("!I4x", frame, at)
            columns.append(Column(column, type_oid))
            at += 8
    except (struct.error, ValueError) as error:
        raise MalformedStream(f"Relation message of {len(frame)} bytes is cut short") from error
    if at != len(frame):
        raise MalformedStream(f"Relation message has {len(frame) - at} bytes too many")
    return Relation(relation_id, namespace or "pg_catalog", name, tuple(columns))


def _cstring(frame: bytes, start: int, encoding: Encoding) -> tuple[str, int]:
    """The NUL-terminated string at ``start``, and where the next field begins. Raises ValueError."""
    end = frame.index(0, start)
    return encoding.text(frame[start:end]), end + 1
