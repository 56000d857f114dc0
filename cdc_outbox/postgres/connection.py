"""Connecting to PostgreSQL, and telling from its refusals whether waiting helps or an operator is needed.

Source: PostgreSQL manual, "Appendix A. Error Codes"; libpq reports no SQLSTATE for a failed connection attempt, so
those are told apart by the server's English wording, and what is not recognised is tried again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import psycopg
from psycopg import conninfo

from cdc_outbox.errors import (
    CdcOutboxError,
    ConfigurationError,
    OperatorNeeded,
    ServerStopping,
    SlotInUse,
    SourceUnavailable,
)

Connection = psycopg.Connection[tuple[Any, ...]]

#: What the DSN may say otherwise. Dead peers are noticed by TCP within about 30 s; of several hosts the primary is
#: taken, because the slot lives there.
_DEFAULTS: Final[dict[str, str | int]] = {
    "target_session_attrs": "primary",
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}

#: Wordings of a refusal that no waiting will change, each with what mends it.
_REFUSALS: Final = (
    ("password authentication failed", "check the user and password in postgres.dsn, or PGPASSFILE"),
    ("no password supplied", "put a password into postgres.dsn, or use PGPASSFILE"),
    ("authentication failed", "check the user and credentials in postgres.dsn"),
    ("no pg_hba.conf entry", "allow this host, user and database in pg_hba.conf"),
    ("pg_hba.conf rejects", "allow this host, user and database in pg_hba.conf"),
    ("is not permitted to log in", "ALTER ROLE ... LOGIN"),
    ("permission denied to start WAL sender", "ALTER ROLE ... REPLICATION"),
    ("must be superuser or replication role", "ALTER ROLE ... REPLICATION"),
    ("does not exist", "check the database and user in postgres.dsn"),
    ("does not support SSL", "enable TLS on the server, or change sslmode in postgres.dsn"),
    ("certificate", "check sslmode, sslrootcert, sslcert and sslkey in postgres.dsn"),
)

_IN_USE: Final = "55006"
_ADMIN_SHUTDOWN: Final = "57P01"
MIGRATE_HINT: Final = "see that postgres.dsn names the right server and database, then run: cdc-outbox migrate up"
#: By SQLSTATE, what is true of it whatever was being done. Who knows more gives hints of their own to `translated`.
_NEEDS_OPERATOR: Final = {
    "42501": "grant the role what it lacks, or let an administrator run this",
    "42704": "",
    "42P01": MIGRATE_HINT,
    "3F000": MIGRATE_HINT,
    "55P03": "a lock is held too long; look for long transactions in pg_stat_activity",
    "55000": "",
    "53400": "",
}
#: For what makes a slot.
SLOT_HINTS: Final = {"53400": "raise max_replication_slots on the server, and restart it"}


class BoundedConnection(psycopg.Connection[tuple[Any, ...]]):
    """Gives up a server that has not answered a statement within ``answer_seconds``, with an OperationalError.

    PostgreSQL's own statement_timeout does not help when the network is what does not answer.
    """

    #: None: whoever asks bounds the wait otherwise
    answer_seconds: float | None = 6.0

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        return super().wait(gen, interval, self.answer_seconds if timeout is None else timeout)


def connect(dsn: str, *, application_name: str = "cdc-outbox", **parameters: str) -> Connection:
    """An autocommit connection, for statements that may take as long as they take; ``parameters`` are libpq's.

    Raises ConfigurationError for a DSN that cannot be read, SourceUnavailable, OperatorNeeded.
    """
    with _refusals_explained():
        return psycopg.connect(
            connection_parameters(dsn, application_name=application_name, **parameters), autocommit=True
        )


def connect_bounded(dsn: str, *, application_name: str = "cdc-outbox state") -> Connection:
    """A connection on which no lock and no server holds us up for long, and what is committed is durable.

    Raises as ``connect`` does.
    """
    with _refusals_explained():
        connection = BoundedConnection.connect(
            connection_parameters(dsn, application_name=application_name), autocommit=True
        )
    with translated("preparing the session"):
        connection.execute("SET statement_timeout = '5s'")
        connection.execute(
            "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
        )
    return connection


def connect_replication(dsn: str) -> BoundedConnection:
    """A replication connection; it speaks only the simple query protocol. Raises as ``connect`` does."""
    with _refusals_explained():
        return BoundedConnection.connect(
            connection_parameters(dsn, application_name="cdc-outbox", replication="database"),
            autocommit=True,
            cursor_factory=psycopg.ClientCursor,
        )


def connection_parameters(dsn: str, *, application_name: str, **parameters: str) -> str:
    """``dsn`` with what it leaves open filled in, as a conninfo string; ``parameters`` go before what it says.

    Raises ConfigurationError.
    """
    given = {"fallback_application_name": application_name, **_DEFAULTS, **parse_dsn(dsn), **parameters}
    return conninfo.make_conninfo("", **{**given, "client_encoding": "UTF8"})


def parse_dsn(dsn: str) -> dict[str, Any]:
    """Raises ConfigurationError, without repeating the DSN: it may hold a password."""
    try:
        return conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError as error:
        raise ConfigurationError(
            "postgres.dsn is not a connection string",
            hint="e.g. postgresql://user@host:5432/database, or host=... dbname=... user=...",
        ) from error


@contextmanager
def translated(what: str, hints: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turn what psycopg raises inside into the tree of errors.py; ``what`` says what was being done.

    ``hints`` says by SQLSTATE what to do about it there: one SQLSTATE has many causes.
    """
    try:
        yield
    except psycopg.Error as error:
        raise explain(error, what, hints) from error


def explain(error: psycopg.Error, what: str, hints: Mapping[str, str] | None = None) -> CdcOutboxError:
    """What is to be done about an error of a connection that had been established."""
    state = error.sqlstate
    reason = f"{what}: {first_line(error.diag.message_primary or str(error))}"
    if state == _IN_USE:
        return SlotInUse(reason)
    if state == _ADMIN_SHUTDOWN:
        return ServerStopping(reason)
    hint = {**_NEEDS_OPERATOR, **(hints or {})}.get(state or "")
    if hint is not None:
        return OperatorNeeded(reason, hint=hint)
    if state is None or state[:2] in ("08", "57", "53", "40", "58", "XX"):
        return SourceUnavailable(reason)
    return OperatorNeeded(f"{reason} (SQLSTATE {state})")


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0].strip()


@contextmanager
def _refusals_explained() -> Iterator[None]:
    try:
        yield
    except psycopg.OperationalError as error:
        raise _explain_refusal(error) from error


def _explain_refusal(error: psycopg.OperationalError) -> CdcOutboxError:
    text = " ".join(str(error).split()).removeprefix("connection failed: ")
    for wording, hint in _REFUSALS:
        if wording in text:
            return OperatorNeeded(f"PostgreSQL refuses us: {text}", hint=hint)
    kind = ServerStopping if "is shutting down" in text else SourceUnavailable
    return kind(f"PostgreSQL cannot be reached: {text}")
