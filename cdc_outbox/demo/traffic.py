"""The traffic of the demo: writers that play an application, and a reader that plays a consumer of its events."""

import json
import random
import threading
import time
import uuid
from types import TracebackType
from typing import Final, Self

import psycopg
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

from cdc_outbox.demo.ledger import Ledger
from cdc_outbox.outbox.psycopg import Event, Outbox

#: Transactions a second and writer.
_RATE: Final = 100
_ACCOUNTS_PER_WRITER: Final = 50

AGGREGATE_TYPE: Final = "account"


def make_account_table(dsn: str) -> None:
    """What the application keeps."""
    with psycopg.connect(dsn) as connection:
        connection.execute("CREATE TABLE account (id text PRIMARY KEY, balance int NOT NULL DEFAULT 0)")


class _Worker(threading.Thread):
    """A thread that runs inside the ``with`` and whose error comes out at its end."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._stopping = threading.Event()
        self._error: Exception | None = None

    def work(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        try:
            self.work()
        except Exception as error:  # noqa: BLE001 - raised again in __exit__
            self._error = error

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stopping.set()
        self.join()
        if self._error and kind is None:
            raise self._error


class Writer(_Worker):
    """Moves money between accounts of its own; each change and its event are written in one transaction.

    Of its transactions a tenth is rolled back, and in a tenth a savepoint is: those events must never be seen.
    """

    def __init__(self, number: int, dsn: str, aggregate_type: str, ledger: Ledger) -> None:
        super().__init__(f"writer-{number}")
        self._dsn = dsn
        self._aggregate_type = aggregate_type
        self._accounts = [f"account-{number}-{account}" for account in range(_ACCOUNTS_PER_WRITER)]
        self._ledger = ledger
        self._random = random.Random(number)
        self._outbox = Outbox()

    def work(self) -> None:
        due = time.monotonic()
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while not self._stopping.is_set():
                self._transaction(connection)
                due += 1 / _RATE
                self._stopping.wait(max(0.0, due - time.monotonic()))

    def _transaction(self, connection: psycopg.Connection) -> None:
        fate = self._random.random()
        accounts = self._random.sample(self._accounts, k=self._random.choice([1, 1, 2, 3]))
        kept: list[tuple[str, str]] = []
        with connection.transaction(force_rollback=fate < 0.1):
            kept += [(account, self._change(connection, account)) for account in accounts]
            if fate > 0.9:
                with connection.transaction(force_rollback=True):  # a savepoint
                    self._ledger.rolled_back.append(self._change(connection, accounts[0]))
        if fate < 0.1:
            self._ledger.rolled_back += [event_id for _, event_id in kept]
        else:
            self._ledger.commit(kept)

    def _change(self, connection: psycopg.Connection, account: str) -> str:
        """One business change and its event; returns the event's id."""
        amount = self._random.randrange(-100, 100)
        connection.execute(
            "INSERT INTO account VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET balance = account.balance + %s",
            [account, amount, amount],
        )
        changed = {"amount": amount, "written_at": time.time()}
        return str(self._outbox.emit(connection, Event("account.changed", account, changed, self._aggregate_type)))


class Reader(_Worker):
    """Reads a topic from its beginning and tells the ledger what it sees."""

    def __init__(self, bootstrap_servers: str, topic: str, ledger: Ledger) -> None:
        super().__init__("reader")
        self._topic = topic
        self._ledger = ledger
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap_servers,
                "group.id": f"cdc-outbox-demo-{uuid.uuid4()}",
                "enable.auto.commit": False,
                # a partition's leader of a moment ago may not have offset 0 yet; the default then is the end
                "auto.offset.reset": "earliest",
                "log_level": 0,
            }
        )

    def work(self) -> None:
        partitions = self._consumer.list_topics(self._topic, timeout=10).topics[self._topic].partitions
        self._consumer.assign([TopicPartition(self._topic, number, OFFSET_BEGINNING) for number in partitions])
        while not self._stopping.is_set():
            message = self._consumer.poll(0.1)
            if message is None or message.error():
                continue
            latency_seconds = time.time() - json.loads(message.value() or b"")["written_at"]
            headers = dict(message.headers() or ())
            self._ledger.see(_text(message.key()), _text(headers["id"]), latency_seconds)
        self._consumer.close()


def _text(content: str | bytes | None) -> str:
    return content.decode() if isinstance(content, bytes) else content or ""
