"""What came of requests to the running relay, for whoever waits for it (sql/0004_requests.sql)."""

import time
from dataclasses import dataclass
from typing import Final

from cdc_outbox.postgres.connection import READER, Connection, granting, translated

#: How often the outcome is looked for.
_LOOK_EVERY_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class Outcome:
    """``result``: redriven, refused, passed over. ``state`` and ``detail``: of the parked event, afterwards."""

    result: str
    state: str
    detail: str


def await_outcome(connection: Connection, request_id: int, *, until: float) -> Outcome | None:
    """None if there is none by then (``until``: monotonic seconds). The request stands all the same."""
    while (outcome := _find(connection, request_id)) is None and time.monotonic() < until:
        time.sleep(_LOOK_EVERY_SECONDS)
    return outcome


def _find(connection: Connection, request_id: int) -> Outcome | None:
    with translated("reading cdc_outbox.outcome", granting(connection, READER)):
        row = connection.execute(
            "SELECT result, coalesce(state, 'gone'), coalesce(detail, '') FROM cdc_outbox.outcome"
            " LEFT JOIN cdc_outbox.parked ON parked.id = parked_id WHERE request_id = %s",
            [request_id],
        ).fetchone()
    return Outcome(*row) if row else None
