"""What a policy would say of every row that the outbox still has, beside what the one in force says.

Each row becomes the Insert that the log would bring, and goes through the relay's own row plan and gates: there is no
second way to judge.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from psycopg import sql

from cdc_outbox.config import Config
from cdc_outbox.errors import CdcOutboxError, ConfigurationError, PoisonEvent
from cdc_outbox.operations.event_status import commit_time
from cdc_outbox.postgres.catalog import Table
from cdc_outbox.postgres.connection import READER, Connection, encoding_of, granting, translated
from cdc_outbox.relay.policy.document import Policy, Throttle, read_policy
from cdc_outbox.relay.policy.explain import Judged
from cdc_outbox.relay.policy.gate import Gates, Ruling, field_of
from cdc_outbox.relay.policy.throttle import Slots
from cdc_outbox.relay.router import Outbox, Router, Ruled
from cdc_outbox.relay.topic_template import TopicTemplate
from cdc_outbox.service.preflight import find_outbox
from cdc_outbox.wal.frames import MESSAGE_START, XLOG_DATA
from cdc_outbox.wal.pgoutput import Column, Relation

_MOST_SAMPLES: Final = 5
_REPORT_EVERY_ROWS: Final = 5_000
#: From the least to the most that is kept inside.
_STRICTNESS: Final = ("allow", "throttle", "approve", "deny")
#: With it a plan gives each event away as a policy gets it, whether or not its topic can be there.
_EVERYTHING_DENIED: Final = Gates(read_policy(b"version = 1"))
_HEADER: Final = bytes([XLOG_DATA]).ljust(MESSAGE_START, b"\0")


@dataclass(slots=True)
class Tally:
    """What one rule of the candidate takes; an empty rule is the policy's default. Samples are ids of events."""

    rule: str
    verdict: str
    events: int = 0
    #: of them, those for which the rule could not be evaluated
    errors: int = 0
    #: of them, those that the policy in force treats less, or more, strictly
    stricter: int = 0
    looser: int = 0
    #: of a rule that throttles: those that would wait, those denied because they would wait too long, the longest wait
    waiting: int = 0
    denied: int = 0
    longest_wait_seconds: float = 0.0
    samples: list[str] = field(default_factory=list)
    looser_samples: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Trial:
    """``unroutable``: rows that could never be published, whatever a policy says."""

    rows: int = 0
    unroutable: int = 0
    rules: list[Tally] = field(default_factory=list)
    #: by rule in mode watch, events that it would have taken
    watched: dict[str, int] = field(default_factory=dict)

    @property
    def looser(self) -> int:
        return sum(tally.looser for tally in self.rules)

    @property
    def stricter(self) -> int:
        return sum(tally.stricter for tally in self.rules)


def try_on_rows(
    connection: Connection, config: Config, candidate: Policy, active: Policy | None, progress: Callable[[int], None]
) -> Trial:
    """``active``: the one in force; without one every event is allowed. ``progress`` is told how many rows were judged.

    In commit order, as far as the server knows it. Raises OperatorNeeded if the role may not read the outbox.
    """
    topic = TopicTemplate(config.kafka.topic, config.kafka.topic_pattern)
    table = find_outbox(config, connection, topic)
    judges = _Judges(candidate, active, topic)
    trial = Trial()
    for event, is_poison in _Reader(connection, config, table, topic).events():
        trial.rows += 1
        trial.unroutable += not judges.judge(event, is_poison=is_poison)
        if trial.rows % _REPORT_EVERY_ROWS == 0:
            progress(trial.rows)
    trial.rules, trial.watched = list(judges.tallies.values()), judges.candidate.watched
    return trial


def find_event(connection: Connection, config: Config, event_id: str) -> Judged:
    """A row of the outbox, as the policy gets it. Raises ConfigurationError if it is not there, or is poison."""
    topic = TopicTemplate(config.kafka.topic, config.kafka.topic_pattern)
    table = find_outbox(config, connection, topic)
    found = list(_Reader(connection, config, table, topic).events(event_id))
    for event, is_poison in found:
        if not is_poison:
            return event
    what = "could never be published" if found else f"is not in {table}"
    raise ConfigurationError(f"event {event_id!r} {what}", hint="its id is that of the outbox's row")


class _Reader:
    """Reads rows as the relay would get them."""

    def __init__(self, connection: Connection, config: Config, table: Table, topic: TopicTemplate) -> None:
        self._connection = connection
        self._table = table
        self._encoding = encoding_of(connection)
        outbox = Outbox(table.namespace, table.name, config.outbox.columns.mapping())
        columns = tuple(Column(name, type_oid) for name, type_oid in table.columns.items())
        self._relation = Relation(table.oid, table.namespace, table.name, columns)
        source = f"/postgresql/{connection.info.dbname}/{table}"
        self._router = Router(outbox, topic, config.kafka.headers, source, (), self._encoding)
        plan = self._router.compile(self._relation, _EVERYTHING_DENIED)
        assert plan is not None  # the table is the outbox
        self._plan = plan.read
        self._id = sql.Identifier(outbox.column("id", table.columns) or "id")
        self._head = _HEADER + self._relation.insert_head

    def events(self, event_id: str | None = None) -> Iterator[tuple[Judged, bool]]:
        """All, or those with this id; and whether it is poison, whatever a policy says."""
        committed = commit_time(self._connection, self._table)
        query = sql.SQL(
            "COPY (SELECT (extract(epoch FROM coalesce({committed}, now())) * 1000)::bigint::text::bytea, {columns}"
            " FROM {table} AS event WHERE {wanted} ORDER BY {committed}) TO STDOUT (FORMAT binary)"
        ).format(
            wanted=sql.SQL("true")
            if event_id is None
            else sql.SQL("format('%s', event.{}) = {}").format(self._id, event_id),
            committed=committed,
            columns=sql.SQL(", ").join(map(self._as_sent, self._table.columns)),
            table=self._table.identifier,
        )
        identifier = self._table.identifier.as_string()
        rights = granting(self._connection, READER, f"SELECT ON {identifier}", schema=self._table.namespace)
        with translated(f"reading {self._table}", rights), self._connection.cursor().copy(query) as copy:
            copy.set_types(["bytea"] * (len(self._table.columns) + 1))
            for commit_time_ms, *values in copy.rows():
                yield self._event(self._head + b"".join(map(_value, values)), int(commit_time_ms))

    def _as_sent(self, column: str) -> sql.Composed:
        """By the type's output function, as the log has it: a cast to text would trim a char(n)."""
        return sql.SQL("CASE WHEN event.{0} IS NOT NULL THEN convert_to(format('%s', event.{0}), {1}) END").format(
            sql.Identifier(column),
            sql.SQL("'UTF8'" if self._encoding.codec is None else "getdatabaseencoding()::name"),
        )

    def _event(self, frame: bytes, commit_time_ms: int) -> tuple[Judged, bool]:
        try:
            self._plan(frame, commit_time_ms)
        except Ruled as ruled:
            event, is_poison = ruled.event, False
        except CdcOutboxError:
            event, is_poison = self._router.describe(self._relation, frame, commit_time_ms), True
        aggregate_type, event_type, event_id = (
            None if each is None else each.encode() for each in (event.aggregate_type, event.event_type, event.event_id)
        )
        return Judged((aggregate_type, event_type), event_id, event.record, commit_time_ms), is_poison


class _Judges:
    def __init__(self, candidate: Policy, active: Policy | None, topic: TopicTemplate) -> None:
        self.candidate = Gates(candidate)
        self._active = Gates(active) if active else None
        self._topic = topic
        #: by rule and verdict
        self.tallies: dict[tuple[str, str], Tally] = {}
        self._slots: dict[str, Slots] = {}

    def judge(self, event: Judged, *, is_poison: bool) -> bool:
        """False if it can never be published, and no policy keeps it inside before that is found out."""
        ruling = _ruling(self.candidate, event, is_poison=is_poison)
        if ruling is None or (ruling.is_allowed and not self._has_topic(event)):
            return False
        before = _ruling(self._active, event, is_poison=is_poison) if self._active else None
        self._count(ruling, before.action.verdict if before else "allow", event)
        return True

    def _has_topic(self, event: Judged) -> bool:
        try:
            self._topic.check(event.record.topic)
        except PoisonEvent:
            return False
        return True

    def _count(self, ruling: Ruling, before: str, event: Judged) -> None:
        verdict = ruling.action.verdict
        key = (ruling.rule, verdict)
        tally = self.tallies.get(key) or self.tallies.setdefault(key, Tally(ruling.rule, verdict))
        tally.events += 1
        tally.errors += ruling.is_error
        event_id = (event.event_id or b"").decode(errors="replace")
        if len(tally.samples) < _MOST_SAMPLES:
            tally.samples.append(event_id)
        tally.stricter += _STRICTNESS.index(verdict) > _STRICTNESS.index(before)
        if _STRICTNESS.index(verdict) < _STRICTNESS.index(before):
            tally.looser += 1
            if len(tally.looser_samples) < _MOST_SAMPLES:
                tally.looser_samples.append(event_id)
        if isinstance(ruling.action, Throttle):
            self._throttle(tally, ruling.action, event)

    def _throttle(self, tally: Tally, action: Throttle, event: Judged) -> None:
        slots = self._slots.get(tally.rule) or self._slots.setdefault(tally.rule, Slots(action.rate))
        key = tuple(field_of(name, event.types, event.event_id, event.record) for name in action.by)
        wait = slots.wait_seconds(key, event.commit_time_ms / 1000)
        if action.max_wait is not None and wait > action.max_wait:
            slots.give_back(key)
            tally.denied += 1
            return
        tally.waiting += wait > 0
        tally.longest_wait_seconds = max(tally.longest_wait_seconds, wait)


def _ruling(gates: Gates, event: Judged, *, is_poison: bool) -> Ruling | None:
    """None for poison that its types do not keep inside."""
    if not is_poison:
        return gates.judge(event.types, event.event_id, *event.record, event.commit_time_ms, "outbox")
    ruling = gates.by_types(event.types)
    return ruling if ruling and not ruling.is_allowed else None


def _value(value: bytes | None) -> bytes:
    """As in an Insert."""
    return b"n" if value is None else b"t" + struct.pack("!I", len(value)) + value
