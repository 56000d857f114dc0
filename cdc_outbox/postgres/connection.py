"""Connecting to PostgreSQL, and telling from its refusals whether waiting helps or an operator is needed.

Source: PostgreSQL manual, "Appendix A. Error Codes"; libpq reports no SQLSTATE for a failed connection attempt, so
those are told apart by the server's English wording, and what is not recognised is tried again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import psycopg
from psycopg import conninfo, pq, sql

from cdc_outbox.errors import (
    CdcOutboxError,
    ConfigurationError,
    OperatorNeeded,
    ServerStopping,
    SlotInUse,
    SourceUnavailable,
)
from cdc_outbox.wal.encodings import Encoding, encoding_named

Connection = psycopg.Connection[tuple[Any, ...]]

#: What DSN, service file and environment may say otherwise. Dead peers are noticed by TCP within about 30 s; of several
#: hosts the primary is taken, because the slot lives there.
_DEFAULTS: Final[dict[str, str | int]] = {
    "target_session_attrs": "primary",
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}

#: What a role or a database may say otherwise (ALTER ... SET), and what our statements depend on: how values are
#: written and names are found, which errors and waits cut a statement short, and whether we may write at all. Not the
#: time zone: it says what a column or a partition without one means.
_PINNED: Final = {
    "statement_timeout": "0",
    "lock_timeout": "0",
    "transaction_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    "exit_on_error": "off",
    "client_min_messages": "warning",
    "search_path": "public",
    "datestyle": "ISO",
    "intervalstyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "3",
    "quote_all_identifiers": "off",
    "standard_conforming_strings": "on",
    "array_nulls": "on",
    "transform_null_equals": "off",
    "row_security": "on",
    "restrict_nonsystem_relation_kind": "",
    "plpgsql.extra_errors": "none",
}
#: Settings that not every version has: by major version, the first minor one; later major versions have them all.
_SINCE: Final = {
    "transaction_timeout": {17: 0},
    "restrict_nonsystem_relation_kind": {14: 13, 15: 8, 16: 4, 17: 0},
}

#: For what makes a slot.
SLOT_HINTS: Final = {
    "53400": "raise max_replication_slots on the server, and restart it",
    "42501": "ALTER ROLE ... REPLICATION, or as your provider says (GRANT rds_replication TO ...)",
}

#: Wordings of a refusal that no waiting will change, each with its hint.
_REFUSALS: Final = (
    ("password authentication failed", "check the user and password in postgres.dsn, or PGPASSFILE"),
    ("no password supplied", "put a password into postgres.dsn, or use PGPASSFILE"),
    ("authentication failed", "check the user and credentials in postgres.dsn"),
    ("no pg_hba.conf entry", "allow this host, user and database in pg_hba.conf"),
    ("pg_hba.conf rejects", "allow this host, user and database in pg_hba.conf"),
    ("is not permitted to log in", "ALTER ROLE ... LOGIN"),
    ("permission denied to start WAL sender", SLOT_HINTS["42501"]),
    ("must be superuser or replication role", SLOT_HINTS["42501"]),
    ("does not exist", "check the database and user in postgres.dsn"),
    ("does not support SSL", "enable TLS on the server, or change sslmode in postgres.dsn"),
    ("certificate", "check sslmode, sslrootcert, sslcert and sslkey in postgres.dsn"),
)

#: How psycopg begins what libpq says before it speaks to anybody: a value that it cannot use.
_NOT_TRIED: Final = "connection is bad: "

_IN_USE: Final = "55006"
_ADMIN_SHUTDOWN: Final = "57P01"
MIGRATE_HINT: Final = "see that postgres.dsn names the right server and database, then run: cdc-outbox migrate up"
#: By SQLSTATE, what is true of it whatever was being done. Who knows more gives hints of their own to `translated`.
_NEEDS_OPERATOR: Final = {
    "42501": "deploy/operating.md has the rights that each command needs; or let an administrator run this",
    "42704": "",
    "42P01": MIGRATE_HINT,
    "3F000": MIGRATE_HINT,
    "55P03": "a lock is held too long; look for long transactions in pg_stat_activity",
    "55000": "",
    "53400": "",
}
#: What passes although its class does not say so: a server that has become a standby, a session that was cut off.
_PASSING: Final = frozenset({"25006", "25P03", "25P04"})
_PASSING_CLASSES: Final = ("08", "57", "53", "40", "58", "XX")
#: May read all of the relay's state, but for what events say.
READER: Final = "cdc_outbox_reader"
POLICY_ADMIN: Final = "cdc_outbox_policy_admin"
#: Whose rights are those of sql/roles.sql, and no others.
OUR_ROLES: Final = ("cdc_outbox_relay", POLICY_ADMIN, READER)
STATEMENT_TIMEOUT: Final = "5s"


class BoundedConnection(psycopg.Connection[tuple[Any, ...]]):
    """Gives up a server that has not answered a statement within ``answer_seconds``, with an OperationalError.

    PostgreSQL's own statement_timeout does not help when the network is what does not answer.
    """

    #: None: whoever asks bounds the wait otherwise
    answer_seconds: float | None = 6.0

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        return super().wait(gen, interval, self.answer_seconds if timeout is None else timeout)

    @contextmanager
    def allowing(self, seconds: int) -> Iterator[None]:
        """More time for a statement inside. After a failure inside, the connection is of no more use."""
        usual = self.answer_seconds
        self.execute(f"SET statement_timeout = '{seconds}s'".encode())
        self.answer_seconds = seconds + 1.0
        yield
        self.answer_seconds = usual
        self.execute(f"SET statement_timeout = '{STATEMENT_TIMEOUT}'".encode())


def connect(dsn: str, *, application_name: str = "cdc-outbox", **parameters: str) -> Connection:
    """An autocommit connection, for statements that may take as long as they take; ``parameters`` are libpq's.

    Raises ConfigurationError for a DSN that cannot be read, SourceUnavailable, OperatorNeeded.
    """
    with _refusals_explained():
        connection = psycopg.connect(
            connection_parameters(dsn, application_name=application_name, **parameters), autocommit=True
        )
    pin_settings(connection)
    return connection


def connect_bounded(dsn: str, *, application_name: str = "cdc-outbox state") -> BoundedConnection:
    """A connection on which no lock and no server holds us up for long, and what is committed is durable.

    Raises as ``connect`` does.
    """
    with _refusals_explained():
        connection = BoundedConnection.connect(
            connection_parameters(dsn, application_name=application_name), autocommit=True
        )
    pin_settings(connection, statement_timeout=STATEMENT_TIMEOUT)
    with translated("preparing the session"):
        connection.execute(
            "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
        )
    return connection


def connect_replication(dsn: str, **settings: str) -> BoundedConnection:
    """A replication connection; it speaks only the simple query protocol. Raises as ``connect`` does."""
    with _refusals_explained():
        connection = BoundedConnection.connect(
            connection_parameters(dsn, application_name="cdc-outbox", replication="database"),
            autocommit=True,
            cursor_factory=psycopg.ClientCursor,
        )
    pin_settings(connection, **settings)
    return connection


def pin_settings(connection: Connection, **settings: str) -> None:
    """Give a new session the settings that we depend on, and ``settings``; only SETs are sent."""
    with translated("preparing the session"):
        statements = [
            f"SET {name} = '{value}'"
            for name, value in {**_PINNED, **settings}.items()
            if _has_setting(connection.info.server_version, name)
        ]
        connection.execute("; ".join(statements).encode())


def _has_setting(server_version: int, name: str) -> bool:
    major, minor = divmod(server_version, 10_000)
    since = _SINCE.get(name, {0: 0})
    return minor >= since[major] if major in since else major > max(since)


def connection_parameters(dsn: str, *, application_name: str, **parameters: str) -> str:
    """``dsn`` with what it leaves open filled in, as a conninfo string; ``parameters`` go before what it says.

    Raises ConfigurationError.
    """
    said = parse_dsn(dsn)
    given = {"fallback_application_name": application_name, **_DEFAULTS, **_given(dsn), **said, **parameters}
    return conninfo.make_conninfo("", **{**given, "client_encoding": "UTF8"})


def _given(dsn: str) -> dict[str, str]:
    """What DSN, service file and environment say of the settings in _DEFAULTS. libpq finds it out, and only on a
    connection: of one to a socket that is not there, so nobody is connected to.
    """
    nowhere = pq.PGconn.connect_start(conninfo.make_conninfo(dsn, host="/nowhere", hostaddr="").encode())
    try:
        options = {option.keyword.decode(): option for option in nowhere.info}
    finally:
        nowhere.finish()
    return {
        name: value.decode()
        for name in _DEFAULTS
        if (value := options[name].val) is not None and value != options[name].compiled
    }


def encoding_of(connection: psycopg.Connection[Any]) -> Encoding:
    """That of the database which it is to. The server reports it when it is connected to."""
    return encoding_named(connection.info.parameter_status("server_encoding") or "")


def without_secrets(dsn: str) -> str:
    """``dsn`` as keys and values, with *** for what libpq says is not to be shown. Raises ConfigurationError."""
    said = parse_dsn(dsn)
    hidden = {option.keyword.decode() for option in pq.Conninfo.parse(dsn.encode()) if option.dispchar == b"*"}
    return conninfo.make_conninfo("", **{name: "***" if name in hidden else value for name, value in said.items()})


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
    if state is None or state in _PASSING or state[:2] in _PASSING_CLASSES:
        return SourceUnavailable(reason)
    return OperatorNeeded(f"{reason} (SQLSTATE {state})")


def granting(connection: Connection, *granted: str, schema: str = "") -> dict[str, str]:
    """Hints for ``translated``: what to grant where the role may not do what is done.

    ``granted`` are rights or roles, as GRANT has them; ``schema`` is the outbox's, where that is read.
    """
    user = connection.info.user
    role = "..." if user in OUR_ROLES else sql.Identifier(user).as_string()
    usage = [f"USAGE ON SCHEMA {sql.Identifier(schema).as_string()}"] if schema else []
    grants = "; ".join(f"GRANT {right} TO {role}" for right in (*usage, *granted))
    # What is granted to these two is taken back by the next `migrate up`.
    return {"42501": f"let a role of your own do this: {grants}" if user in OUR_ROLES else grants}


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
    if text.startswith(_NOT_TRIED) and "connection to server" not in text:
        return ConfigurationError(f"postgres.dsn: {text.removeprefix(_NOT_TRIED)}", hint="see libpq's connection keys")
    for wording, hint in _REFUSALS:
        if wording in text:
            return OperatorNeeded(f"PostgreSQL refuses us: {text}", hint=hint)
    kind = ServerStopping if "is shutting down" in text else SourceUnavailable
    return kind(f"PostgreSQL cannot be reached: {text}")
