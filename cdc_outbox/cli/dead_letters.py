"""`cdc-outbox dead-letters list|show|redrive|discard`: events that could not be published, and what becomes of them."""

import time
from dataclasses import asdict
from datetime import timedelta
from typing import Any, Final

import click
import orjson
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cdc_outbox.cli.duration import waiting
from cdc_outbox.cli.main import Settings
from cdc_outbox.cli.terminal import print_event, printable
from cdc_outbox.errors import CheckFailed
from cdc_outbox.operations import dead_letters
from cdc_outbox.operations.dead_letters import DeadLetter
from cdc_outbox.operations.requests import await_outcome
from cdc_outbox.postgres.connection import Connection, connect

_ids = click.argument("ids", nargs=-1, required=True, type=int)
#: What a column of the table takes besides its content, and what it takes at least.
_GAP: Final = 3
_LEAST: Final = 8
#: From here on a terminal has room for everything.
_WIDE: Final = 110

_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document.")
_time = click.DateTime(formats=["%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y-%m-%d"])


@click.group()
def command() -> None:
    """Events that could not be published (relay.on_poison = "dead-letter"), and what to do about them."""


@command.command("list")
@click.option("--aggregate", "aggregate_id", metavar="ID", help="Of this aggregate id.")
@click.option("--type", "event_type", metavar="TYPE", help="Of this event type.")
@click.option("--reason", metavar="REASON", help="With this reason, as in the list; % stands for anything.")
@click.option("--since", type=_time, metavar="TIME", help="Parked since then, e.g. 2026-11-01T12:00:00+0000.")
@click.option("--until", type=_time, metavar="TIME", help="Parked before then.")
@click.option("--all", "settled_too", is_flag=True, help="Those too that were redriven or discarded.")
@_as_json
@click.pass_obj
def list_(settings: Settings, /, *, as_json: bool, **wanted: Any) -> None:
    """List dead letters that wait for a decision.

    In the order in which their transactions committed. A TIME without an offset is in the server's time zone.
    """
    with _connect(settings) as connection:
        letters = dead_letters.find(connection, dead_letters.Filter(**wanted))
    if as_json:
        click.echo(orjson.dumps(letters))
        return
    if not letters:
        click.echo("no dead letters" + ("" if wanted["settled_too"] else " that wait for a decision"))
        return
    console = Console()
    console.print(_table(letters, with_state=wanted["settled_too"], width=console.width))


@command.command()
@click.argument("dead_letter_id", metavar="ID", type=int)
@_as_json
@click.pass_obj
def show(settings: Settings, *, dead_letter_id: int, as_json: bool) -> None:
    """Show one dead letter, payload and all."""
    with _connect(settings) as connection:
        letter = dead_letters.get(connection, dead_letter_id)
    print_event(asdict(letter), as_json=as_json)


@command.command()
@_ids
@click.option("--topic", help="Publish to this topic instead of the dead letter's own.")
@click.option("--key", help="Publish with this key instead of the dead letter's own.")
@waiting
@click.pass_obj
def redrive(
    settings: Settings, *, ids: tuple[int, ...], topic: str | None, key: str | None, timeout: timedelta, no_wait: bool
) -> None:
    """Ask the running relay to publish dead letters again.

    The request is a row that reaches the relay through the log. The event is published with the header
    cdc-outbox-redriven. Waits for the outcome, and exits with 4 if one was refused again or nobody took it.
    """
    until = time.monotonic() + timeout.total_seconds()
    publication, slot = settings.config.postgres.publication, settings.config.postgres.slot
    with _connect(settings) as connection:
        requests = dead_letters.request_redrives(connection, publication, slot, ids, topic=topic, key=key)
        if no_wait:
            for each in requests:
                click.echo(f"redrive of dead letter {each} requested")
            return
        failures = [text for each, request in requests.items() if (text := _outcome(connection, each, request, until))]
    if failures:
        raise CheckFailed("; ".join(failures), hint="`cdc-outbox dead-letters list --all` shows what became of each")


def _outcome(connection: Connection, dead_letter_id: int, request_id: int, until: float) -> str:
    """Says what became of it; returns why that is not what was asked for."""
    outcome = await_outcome(connection, request_id, until=until)
    if outcome is None:
        return f"dead letter {dead_letter_id} was not redriven in time: does the relay run? Request {request_id} stands"
    if outcome.result == "redriven":
        click.echo(f"dead letter {dead_letter_id} redriven")
        return ""
    if outcome.result == "refused":
        return f"dead letter {dead_letter_id} was refused again: {printable(outcome.detail)}"
    return f"dead letter {dead_letter_id} was passed over: {outcome.detail}"


@command.command()
@_ids
@click.option("--reason", required=True, help="Why it need not be published; kept with the dead letter.")
@click.pass_obj
def discard(settings: Settings, *, ids: tuple[int, ...], reason: str) -> None:
    """Decide that dead letters need not be published. They are kept."""
    with _connect(settings) as connection:
        for dead_letter_id in ids:
            dead_letters.discard(connection, dead_letter_id, reason)
            click.echo(f"dead letter {dead_letter_id} discarded")


def _table(letters: list[DeadLetter], *, with_state: bool, width: int) -> Table:
    """Where the terminal is narrow the less telling columns go, and of the rest the topic is cut last."""
    narrow = width < _WIDE
    whole = {
        "id": [str(letter.id) for letter in letters],
        **({} if narrow and with_state else {"parked": [f"{letter.created_at:%m-%d %H:%M}" for letter in letters]}),
        "reason": [letter.reason for letter in letters],
        **({"state": [letter.state for letter in letters]} if with_state else {}),
        **({} if narrow else {"tries": [str(letter.attempts) for letter in letters]}),
    }
    cut = {"topic": "topic", "aggregate": "aggregate_id", **({} if narrow else {"type": "event_type"})}
    room = width - sum(max(map(len, [head, *cells])) + _GAP for head, cells in whole.items())
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in whole:
        table.add_column(head, no_wrap=True)
    for left, (head, column) in zip(range(len(cut) - 1, -1, -1), cut.items(), strict=True):
        longest = max(len(head), *(len(printable(getattr(letter, column) or "")) for letter in letters))
        taken = max(_LEAST, min(longest, room - _GAP - left * (_LEAST + _GAP)))
        table.add_column(head, no_wrap=True, max_width=taken)
        room -= taken + _GAP
    for row, letter in zip(zip(*whole.values(), strict=True), letters, strict=True):
        table.add_row(*row, *(Text(printable(getattr(letter, column) or "")) for column in cut.values()))
    return table


def _connect(settings: Settings) -> Connection:
    return connect(settings.config.postgres.dsn.get_secret_value())
