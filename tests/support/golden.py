"""Golden bytes: what a real server of each version sends for one small history, captured once.

`python -m support.golden` (in tests/) captures them again into unit/golden/, from the embedded server and from every
PostgreSQL of Debian's that is installed.
"""

import json
from pathlib import Path

import psycopg

from cdc_outbox.postgres.connection import connect
from cdc_outbox.postgres.stream import ReplicationStream
from cdc_outbox.wal.lsn import LSN
from support.services import OTHER_POSTGRES, other_postgres_dsn, postgres_dsn
from support.waiting import wait_until

FOLDER = Path(__file__).parent.parent / "unit" / "golden"

SETUP = """
CREATE TYPE mood AS ENUM ('fine', 'bad');
CREATE TABLE golden (
    id int PRIMARY KEY, label text, doc json, docb jsonb, raw bytea, "Odd Name" uuid, at timestamptz, feeling mood
);
CREATE PUBLICATION golden FOR TABLE golden WITH (publish = 'insert');
"""

#: One entry a transaction.
HISTORY = (
    """INSERT INTO golden VALUES (1, 'grüße', '{"a":  1}', '{"a":  1}', '\\xDEADBEEF',
       '11111111-2222-3333-4444-555555555555', '2024-02-29 12:00:00.5+00', 'fine')""",
    """INSERT INTO golden (id) SELECT generate_series(2, 4)""",
    """INSERT INTO golden (id, doc) VALUES (5, (SELECT json_build_object('long', repeat('x', 20000))))""",
    """UPDATE golden SET label = 'changed'; DELETE FROM golden WHERE id = 2""",
    """ALTER TABLE golden ADD COLUMN extra int; INSERT INTO golden (id, extra) VALUES (6, 7)""",
)


def capture(dsn: str) -> list[bytes]:
    """All frames of the history, up to the keepalive that confirms its end was reached."""
    with ReplicationStream(dsn) as stream:
        with connect(dsn) as db:
            db.execute(SETUP)
            stream.create_temporary_slot("golden", lock_timeout_seconds=5)
            for transaction in HISTORY:
                with db.transaction():
                    db.execute(transaction.encode())
        stream.start("golden", "golden")
        frames: list[bytes] = []

        def complete() -> bool:
            frames.extend(stream.frames())
            stream.receive()
            tags = b"".join(frame[25:26] for frame in frames)  # a keepalive has none
            return tags.count(b"I") == 6 and tags.endswith(b"C")

        wait_until(complete, "the whole history")
        stream.send_status(LSN(0), request_reply=True)

        def answered() -> bool:
            frames.extend(stream.frames())
            stream.receive()
            return frames[-1][:1] == b"k"

        wait_until(answered, "a keepalive")
        return frames


def main() -> None:
    sources = [postgres_dsn(), *map(other_postgres_dsn, OTHER_POSTGRES)]
    for source in sources:
        with source as dsn:
            with psycopg.connect(dsn) as connection:
                version = connection.info.server_version // 10_000
            frames = [frame.hex() for frame in capture(dsn)]
            (FOLDER / f"{version}.json").write_text(json.dumps(frames, indent=0) + "\n")
            print(f"{version}: {len(frames)} frames")  # noqa: T201 - a script


if __name__ == "__main__":
    main()
