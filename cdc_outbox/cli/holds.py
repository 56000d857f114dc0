"""`cdc-outbox holds list|show`: events that the policy keeps inside."""

from dataclasses import asdict
from typing import Final

import click
import orjson
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cdc_outbox.cli.main import Settings
from cdc_outbox.cli.terminal import print_event, printable
from cdc_outbox.operations import holds
from cdc_outbox.postgres.connection import Connection, connect

_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document.")
_MOST: Final = 1000


@click.group()
def command() -> None:
    """Events that the policy keeps inside."""


@command.command("list")
@click.option("--state", type=click.Choice(holds.STATES), default="denied", show_default=True, help="In this state.")
@click.option("--limit", type=click.IntRange(1), default=_MOST, show_default=True, help="The latest so many.")
@_as_json
@click.pass_obj
def list_(settings: Settings, *, state: str, limit: int, as_json: bool) -> None:
    """List what the policy denied, the latest first."""
    with _connect(settings) as connection:
        found = holds.find(connection, state=state, limit=limit)
    if as_json:
        click.echo(orjson.dumps(found))
    elif not found:
        click.echo(f"nothing is {state}")
    else:
        table = Table("id", "at", "rule", "event", "aggregate", "why", box=box.SIMPLE_HEAD, pad_edge=False)
        for each in found:
            at, rule = f"{each.created_at:%m-%d %H:%M:%S}", each.rule or "(default)"
            shown = (str(each.id), at, rule, each.event_type or "", each.aggregate_id or "", each.reason)
            table.add_row(*(Text(printable(cell)) for cell in shown))
        Console().print(table)


@command.command()
@click.argument("hold_id", metavar="ID", type=int)
@_as_json
@click.pass_obj
def show(settings: Settings, *, hold_id: int, as_json: bool) -> None:
    """Show one, payload and all: event, rule, policy and reason."""
    with _connect(settings) as connection:
        hold = holds.get(connection, hold_id)
    print_event(asdict(hold), as_json=as_json)


def _connect(settings: Settings) -> Connection:
    return connect(settings.config.postgres.dsn.get_secret_value())
