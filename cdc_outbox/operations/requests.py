"""What is asked of the running relay through the log, and what came of it (sql/0004_requests.sql)."""

import time
from dataclasses import dataclass
from typing import Final

from cdc_outbox.errors import OperatorNeeded
from cdc_outbox.postgres.connection import MIGRATE_HINT, READER, Connection, granting, translated

#: How often the outcome is looked for.
_LOOK_EVERY_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class Outcome:
    """``result``: redriven, activated, refused, passed over. ``detail``: why it was refused or passed over."""

    result: str
    detail: str


def check_heard(connection: Connection, publication: str) -> None:
    """Raises OperatorNeeded if no relay of ``publication`` would hear of a request."""
    with translated("looking at the publication"):
        listed = connection.execute(
            "SELECT FROM pg_publication_tables"
            " WHERE pubname = %s AND schemaname = 'cdc_outbox' AND tablename = 'request'",
            [publication],
        ).rowcount
    if not listed:
        raise OperatorNeeded(
            f"publication {publication!r} does not list cdc_outbox.request: the relay would not hear of it",
            hint=MIGRATE_HINT,
        )


def await_outcome(connection: Connection, request_id: int, *, until: float) -> Outcome | None:
    """None if there is none by then (``until``: monotonic seconds). The request stands all the same."""
    while (outcome := _find(connection, request_id)) is None and time.monotonic() < until:
        time.sleep(_LOOK_EVERY_SECONDS)
    return outcome


def _find(connection: Connection, request_id: int) -> Outcome | None:
    with translated("reading cdc_outbox.outcome", granting(connection, READER)):
        row = connection.execute(
            "SELECT result, detail FROM cdc_outbox.outcome WHERE request_id = %s", [request_id]
        ).fetchone()
    return Outcome(*row) if row else None
