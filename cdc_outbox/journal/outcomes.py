"""What came of requests: cdc_outbox.outcome. Over the relay's own connection (sql/0004_requests.sql)."""

from collections.abc import Mapping

from cdc_outbox.postgres.connection import Connection, translated


def outcome_of(connection: Connection, request_id: int) -> str | None:
    """Of a request that was carried out before a crash; None if it was not."""
    with translated("reading cdc_outbox.outcome"):
        query = "SELECT result FROM cdc_outbox.outcome WHERE request_id = %s"
        row = connection.execute(query, [request_id]).fetchone()
    return row[0] if row else None


def record(connection: Connection, requests: Mapping[int, int | None], result: str, detail: str = "") -> None:
    """Of requests, by id, and the parked events that they are about. Durable when it returns, outside a transaction.

    ``detail`` may quote what somebody wrote: what this database cannot hold of it is escaped.
    """
    detail = detail.encode("ascii", "backslashreplace").decode().replace("\0", "\\0")
    with translated("recording what came of a request"):
        connection.execute(
            "INSERT INTO cdc_outbox.outcome (request_id, parked_id, result, detail)"
            " SELECT request_id, parked_id, %s, %s"
            " FROM unnest(%s::bigint[], %s::bigint[]) AS of (request_id, parked_id) ON CONFLICT DO NOTHING",
            [result, detail, list(requests), list(requests.values())],
        )
