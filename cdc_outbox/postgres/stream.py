"""The replication stream: START_REPLICATION over psycopg's libpq wrapper, frames in, status updates out.

It moves bytes; it does not decode them and does not decide what is confirmed. Its connection is asked nothing: whoever
looks at the catalogue there makes the server decode older rows by today's layout of their table, which gives garbage or
brings the server down (PostgreSQL 18). Whoever has a question has a connection of their own.
Never the blocking form of get_copy_data: it holds the GIL for as long as it waits, and freezes every other thread.
Source: PostgreSQL manual, "Streaming Replication Protocol"; libpq, "Functions Associated with the COPY Command".
"""

import select
import time
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import psycopg
from psycopg import pq, sql
from psycopg.errors import lookup as error_class

from cdc_outbox.errors import CdcOutboxError, OperatorNeeded, SourceUnavailable
from cdc_outbox.postgres.connection import (
    SLOT_HINTS,
    connect,
    connect_replication,
    encoding_of,
    explain,
    first_line,
    translated,
)
from cdc_outbox.postgres.server import Server
from cdc_outbox.postgres.slots import check_slot_name, recreate_hint
from cdc_outbox.wal.frames import standby_status_update
from cdc_outbox.wal.lsn import LSN

#: Bounds how long a frozen relay keeps a standby waiting.
_WAL_SENDER_TIMEOUT: Final = "10s"
_NOT_IN_PREREQUISITE_STATE: Final = "55000"
_BROKE: Final = "the replication stream broke"


class ReplicationStream:
    """One replication connection. Raises ConfigurationError, SourceUnavailable, OperatorNeeded."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._slot = ""
        self._connection = connect_replication(dsn, timezone="UTC", wal_sender_timeout=_WAL_SENDER_TIMEOUT)
        self._pgconn = self._connection.pgconn
        self._database = self._connection.info.dbname
        self._encoding = encoding_of(self._connection)
        self._connection.add_notice_handler(self._on_notice)
        self._poller = select.poll()
        self._poller.register(self._pgconn.socket, select.POLLIN)
        self._watched: int | None = None
        #: why the stream is over, once it is
        self._end: CdcOutboxError | None = None
        #: a frame that `receive` found and `frames` has not given yet
        self._next: bytes | None = None
        #: monotonic seconds at which the server was last heard
        self.heard_at = time.monotonic()

    @property
    def backend_pid(self) -> int:
        """The walsender's."""
        return self._pgconn.backend_pid

    def identify(self) -> Server:
        """The server that this stream comes from."""
        with translated("identifying the server"):
            row = self._connection.execute("IDENTIFY_SYSTEM").fetchone()
        assert row is not None
        is_standby = self._pgconn.parameter_status(b"in_hot_standby") == b"on"
        return Server(str(row[0]), int(row[1]), LSN.parse(row[2]), is_standby)

    def create_temporary_slot(self, slot: str, *, lock_timeout_seconds: int) -> None:
        """A slot that begins now and vanishes with this connection. Raises OperatorNeeded.

        ``lock_timeout_seconds`` bounds the wait for each transaction that is open to end.
        """
        command = sql.SQL("CREATE_REPLICATION_SLOT {} TEMPORARY LOGICAL pgoutput NOEXPORT_SNAPSHOT")
        with translated("creating a temporary slot", SLOT_HINTS):
            self._connection.execute(f"SET lock_timeout = '{lock_timeout_seconds}s'")
            self._connection.answer_seconds = None
            self._connection.execute(command.format(sql.Identifier(check_slot_name(slot))))

    def start(self, slot: str, publication: str, *, start_lsn: LSN = LSN(0)) -> None:  # noqa: B008 - immutable
        """Read from ``start_lsn`` on, or from where the slot stands if that is later.

        Raises SlotInUse while another receiver has the slot, OperatorNeeded if it is missing or lost.
        """
        # A string of the replication protocol's own, in which a backslash means nothing.
        names = sql.Identifier(publication).as_string().replace("'", "''")
        options = f"proto_version '1', publication_names '{names}'"
        command = f"START_REPLICATION SLOT {check_slot_name(slot)} LOGICAL {start_lsn} ({options})"
        self._slot = slot
        lost = recreate_hint(slot, self._database)
        with translated(f"replication slot {slot!r} cannot be read", {"42704": lost, "55000": lost}):
            if self._encoding.codec is None:
                self._connection.execute(command.encode())
            else:
                self._start_as_stored(command)
        self._pgconn.nonblocking = 1
        self.heard_at = time.monotonic()

    def _start_as_stored(self, command: str) -> None:
        """With text as the server stores it, see `encodings`; a stream that does not start is asked other things."""
        self._connection.execute("SET client_encoding = 'SQL_ASCII'")
        try:
            self._connection.execute(command.encode(self._encoding.codec or "utf-8", errors="replace"))
        except psycopg.Error:
            with suppress(psycopg.Error):
                self._connection.execute("SET client_encoding = 'UTF8'")
            raise

    def is_given_up(self) -> bool:
        """Whether the server has ended the stream without our hearing of it, asked on a fresh connection.

        On a half-open connection there is only silence, as there is while a walsender works off what is not for us.
        """
        query = "SELECT active_pid IS DISTINCT FROM %s FROM pg_replication_slots WHERE slot_name = %s"
        with suppress(CdcOutboxError, psycopg.Error), connect(self._dsn, connect_timeout="3") as connection:
            return connection.execute(query, [self._pgconn.backend_pid, self._slot]).fetchone() == (True,)
        return False

    def frames(self) -> Iterator[bytes]:
        """The frames that are complete in libpq's buffer. Raises SourceUnavailable when the stream has ended."""
        get_copy_data = self._pgconn.get_copy_data
        if self._next is not None:
            frame, self._next = self._next, None
            yield frame
        try:
            while True:
                size, data = get_copy_data(1)
                if size <= 0:
                    break
                yield data.tobytes()
        except psycopg.Error as error:
            raise self._end or explain(error, _BROKE) from error
        if size < 0:
            self._end = self._explain_end()
        if self._end:
            raise self._end

    def receive(self) -> bool:
        """Take in what has arrived; True if `frames` has something to give (or to raise), False if all ran dry."""
        if self._next is not None:
            return True
        try:
            # Twice over TLS: a record may have fitted into libpq's buffer only in part, and the rest, already out of
            # the socket, would not wake `wait`.
            for _ in range(2 if self._pgconn.ssl_in_use else 1):
                self._pgconn.consume_input()
            size, data = self._pgconn.get_copy_data(1)
        except psycopg.OperationalError as error:
            # Raised by `frames` after what arrived before it: the server's own reason may be among that.
            self._end = explain(error, _BROKE)
            return True
        if size > 0:
            self._next = data.tobytes()
            self.heard_at = time.monotonic()
        elif size < 0:
            self._end = self._explain_end()
        return size != 0

    def wait(self, timeout_seconds: float) -> None:
        """Sleep until the socket has something (or a watched descriptor has), at most ``timeout_seconds``."""
        for descriptor, _ in self._poller.poll(timeout_seconds * 1000):
            if descriptor == self._pgconn.socket:  # perhaps a piece of a large frame: the server is there
                self.heard_at = time.monotonic()

    def watch(self, descriptor: int) -> None:
        """Let ``wait`` wake up for another file descriptor too, until ``unwatch``."""
        self._watched = descriptor
        self._poller.register(descriptor, select.POLLIN)

    def unwatch(self) -> None:
        if self._watched is not None:
            self._poller.unregister(self._watched)
            self._watched = None

    def send_status(self, confirmed: LSN, *, request_reply: bool = False) -> None:
        if self._end:
            raise self._end
        update = standby_status_update(confirmed, unix_seconds=time.time(), request_reply=request_reply)
        with translated(_BROKE):
            self._pgconn.put_copy_data(update)
            # What does not fit into the socket now goes out with the next one.
            self._pgconn.flush()

    def end(self, timeout_seconds: float) -> None:
        """End the copy properly: when this returns the last status update has been taken in and the slot is free.

        What the server was about to send is thrown away. Closing with it unread would reset the connection, and the
        server might never see the update. Best effort: the stream may be broken, or time may be up.
        """
        deadline = time.monotonic() + timeout_seconds
        with suppress(psycopg.Error, CdcOutboxError):
            self._pgconn.put_copy_end()
            while self._pgconn.flush() and time.monotonic() < deadline:
                self.receive()
            while time.monotonic() < deadline:
                for _ in self.frames():
                    pass
                self.wait(0.05)
                self.receive()

    def close(self) -> None:
        self._end = None  # its traceback holds whoever was reading, down to the producer
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _on_notice(self, notice: psycopg.errors.Diagnostic) -> None:
        """PostgreSQL 18 only warns that it sends nothing of a publication, and its keepalives go on to advance.

        libpq calls this while it parses: nothing behind the warning has been confirmed yet, and nothing will be.
        """
        if notice.sqlstate == _NOT_IN_PREREQUISITE_STATE:
            self._end = OperatorNeeded(
                f"PostgreSQL sends nothing: {notice.message_primary} ({notice.message_detail})",
                hint=self._publication_hint(),
            )

    def _publication_hint(self) -> str:
        return (
            "a publication must be older than what its slot has yet to read: this one was dropped, or made later; if "
            f"there is no other for it, {recreate_hint(self._slot, self._database)}"
        )

    def _explain_end(self) -> CdcOutboxError:
        result = self._pgconn.get_result()
        if result is None or result.status in (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.COPY_IN):
            return SourceUnavailable("the server ended the replication stream")
        state = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
        message = first_line(result.get_error_message())
        try:
            error = error_class(state)(message)
        except KeyError:
            error = psycopg.OperationalError(message)
        lost = recreate_hint(self._slot, self._database)
        hints = {"42704": self._publication_hint(), "55000": lost}
        return explain(error, "the server ended the replication stream", hints)
