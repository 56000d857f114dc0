"""Plans: what to do with the Inserts of each relation that the stream has introduced, under the policy in force."""

from typing import TYPE_CHECKING

from cdc_outbox.errors import OperatorNeeded
from cdc_outbox.relay.requests import ReadRequest, Request, compile_request_reader
from cdc_outbox.relay.router import EventDescription, Router, Routing
from cdc_outbox.wal.pgoutput import INSERT_HEAD, Relation

if TYPE_CHECKING:
    from cdc_outbox.relay.policy.gate import Gates, Ruling
    from cdc_outbox.wal.row_plan import InsertFunction


class Plans:
    """By the head of an Insert: message tag, relation and number of columns."""

    def __init__(self, routing: Routing, gates: "Gates | None") -> None:
        """``gates``: of the policy in force."""
        self._routing = routing
        self.gates = gates
        #: from an Insert to a record; None for tables that hold no events
        self.read: dict[bytes, InsertFunction | None] = {}
        self._router_of: dict[bytes, Router] = {}
        self._relations: dict[bytes, Relation] = {}
        self._read_request: dict[bytes, ReadRequest] = {}
        #: what Inserts that nobody routes are answered with, where they must not pass
        self._refusals: dict[bytes, OperatorNeeded] = {}

    def introduce(self, relation: Relation) -> None:
        head = relation.insert_head
        self._relations[head] = relation
        self.read[head] = None
        self._refusals.pop(head, None)
        self._read_request.pop(head, None)
        for router in self._routing.routers:
            if plan := router.compile(relation, self.gates):
                self.read[head], self._router_of[head] = plan.read, router
        if self.read[head] is None and (refusal := self._routing.strays.refusal(relation)):
            self._refusals[head] = refusal
        try:
            if read := compile_request_reader(relation, self._routing.encoding):
                self._read_request[head] = read
        except OperatorNeeded as error:  # only once there is a request
            self._refusals[head] = error

    def govern(self, gates: "Gates") -> None:
        """From here on events are judged by these."""
        self.gates = gates
        for relation in list(self._relations.values()):
            self.introduce(relation)

    def router_of(self, frame: bytes) -> Router:
        """Of an event's Insert."""
        return self._router_of[frame[INSERT_HEAD]]

    def describe(self, frame: bytes, commit_time_ms: int) -> EventDescription:
        """See `Router.describe`."""
        return self.router_of(frame).describe(self._relations[frame[INSERT_HEAD]], frame, commit_time_ms)

    def ruling_by_types(self, event: EventDescription) -> "Ruling | None":
        """Of an event that is poison: whether its types alone keep it inside."""
        if not self.gates:
            return None
        aggregate_type, event_type = event.aggregate_type, event.event_type
        ruling = self.gates.by_types(
            (
                None if aggregate_type is None else aggregate_type.encode(),
                None if event_type is None else event_type.encode(),
            )
        )
        return ruling if ruling and not ruling.is_allowed else None

    def request(self, frame: bytes) -> Request | None:
        """Of an Insert that is no event; None if it asks for nothing. Raises OperatorNeeded if it must not pass."""
        head = frame[INSERT_HEAD]
        if head in self._refusals:
            raise self._refusals[head]
        read = self._read_request.get(head)
        return read(frame) if read else None
