"""`cdc-outbox inbox list|show|unpark|discard`: messages that a consumer could not handle, and what becomes of them."""

import shutil
import textwrap
import time
from datetime import timedelta
from typing import Final

import click
import orjson

from cdc_outbox.cli.duration import Duration
from cdc_outbox.cli.main import Settings
from cdc_outbox.cli.terminal import portable, print_field, printable
from cdc_outbox.errors import CheckFailed, ConfigurationError
from cdc_outbox.inbox.table import beside
from cdc_outbox.postgres import parked
from cdc_outbox.postgres.connection import Connection, connect

_ASK_SECONDS: Final = 0.2

_inbox = click.option("--table", default="public.inbox", show_default=True, help="The inbox table, with its schema.")
_consumer = click.option("--consumer", metavar="NAME", help="Only this consumer's messages.")
_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document.")
_ids = click.argument("message_ids", metavar="[ID]...", nargs=-1)
_all = click.option("--all", "every", is_flag=True, help="All that are parked, instead of those named.")


@click.group()
def command() -> None:
    """Messages that a consumer could not handle: list, show, unpark, discard.

    In the consumer's database, the one with its inbox: postgres.dsn names it.
    """


@command.command("list")
@_consumer
@click.option(
    "--all",
    "all_too",
    is_flag=True,
    help="Also those behind another, and the handled and discarded.",
)
@_inbox
@_as_json
@click.pass_obj
def list_(settings: Settings, *, consumer: str | None, all_too: bool, table: str, as_json: bool) -> None:
    """List messages that wait for a decision (parked) or are being tried again (retry).

    And how many of the same key wait behind each.
    """
    with _connection(settings, table) as connection:
        rows = parked.find(connection, table, consumer=consumer, all_too=all_too)
    if as_json:
        click.echo(orjson.dumps([{**row, "key": portable(row["key"])} for row in rows]))
        return
    if not rows:
        click.echo("nothing is parked")
        return
    for row in rows:
        _show_row(row, shutil.get_terminal_size().columns)


@command.command()
@click.argument("message_id", metavar="ID")
@_consumer
@_inbox
@_as_json
@click.pass_obj
def show(settings: Settings, *, message_id: str, consumer: str | None, table: str, as_json: bool) -> None:
    """Show one parked message, value and all."""
    with _connection(settings, table) as connection:
        row = parked.get(connection, table, message_id, consumer=consumer)
    if as_json:
        click.echo(orjson.dumps({**row, **{name: portable(row[name]) for name in ("key", "value")}}))
        return
    for name, content in row.items():
        if name == "headers":
            for header, value in content.items():
                print_field("header", f"{header}: {value}")
        elif content is not None:
            print_field(name, content)


@command.command()
@_ids
@_all
@_consumer
@_inbox
@click.option("--timeout", type=Duration(), default="30s", show_default=True, help="How long to wait for the outcome.")
@click.option("--no-wait", is_flag=True, help="Ask, and do not wait.")
@click.pass_obj
def unpark(
    settings: Settings,
    *,
    message_ids: tuple[str, ...],
    every: bool,
    consumer: str | None,
    table: str,
    timeout: timedelta,
    no_wait: bool,
) -> None:
    """Ask the running consumer to handle parked messages again, and after each what waits behind it, in order.

    Waits for the outcome, and exits with 4 if a message failed again or nobody took it.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    with _connection(settings, table) as connection:
        asked = [
            parked.unpark(connection, table, message_id, consumer=name)
            for message_id, name in _named(connection, table, message_ids, consumer, every=every)
        ]
        if no_wait:
            click.echo(f"asked for {len(asked)} to be handled again")
            return
        failures = [text for row in asked if (text := _outcome(connection, table, row, deadline))]
    if failures:
        raise CheckFailed("; ".join(failures), hint="`cdc-outbox inbox list` shows what is parked")


@command.command()
@_ids
@_all
@_consumer
@_inbox
@click.pass_obj
def discard(settings: Settings, *, message_ids: tuple[str, ...], every: bool, consumer: str | None, table: str) -> None:
    """Give parked messages up: they will never be handled. What waits behind them goes on."""
    with _connection(settings, table) as connection:
        for message_id, name in _named(connection, table, message_ids, consumer, every=every):
            parked.discard(connection, table, message_id, consumer=name)
            click.echo(f"message {printable(repr(message_id))} discarded")


def _named(
    connection: Connection, table: str, message_ids: tuple[str, ...], consumer: str | None, *, every: bool
) -> list[tuple[str, str | None]]:
    """Ids, each with its consumer."""
    if every == bool(message_ids):
        raise ConfigurationError("name messages by their ids, or say --all")
    if not every:
        return [(message_id, consumer) for message_id in message_ids]
    rows = parked.find(connection, table, consumer=consumer, all_too=False)
    named = [(row["message_id"], row["consumer"]) for row in rows if row["state"] == "parked"]
    if not named:
        click.echo("nothing is parked" + (f"; {len(rows)} are being tried again" if rows else ""))
    return named


def _outcome(connection: Connection, table: str, asked: parked.Row, deadline: float) -> str:
    """Says what became of it; returns why that is not what was asked for."""
    name = printable(repr(asked["message_id"]))
    while True:
        row = parked.get(connection, table, asked["message_id"], consumer=asked["consumer"])
        if row["state"] in ("handled", "discarded"):
            click.echo(f"message {name} {row['state']}" + (f"; {asked['behind']} behind it" if asked["behind"] else ""))
            return ""
        if row["state"] == "parked":
            return f"message {name} failed again: {printable(row['error'] or '')}"
        if time.monotonic() > deadline:
            return f"message {name} was not handled in time: does its consumer run? The request stands"
        time.sleep(_ASK_SECONDS)


def _show_row(row: parked.Row, width: int) -> None:
    """Three lines, not a line of a table: an id and an error are long, and both are needed whole."""
    behind = f", behind it: {row['behind']}" if row["behind"] else ""
    click.echo(f"{printable(row['message_id'])}  {row['state']} (attempts: {row['attempts']}{behind})")
    key = f", key {printable(row['key'])}" if row["key"] is not None else ""
    click.echo(f"    {row['consumer']}: {row['topic']}[{row['partition']}]@{row['offset']}{key}")
    if row["error"]:
        click.echo(textwrap.indent(textwrap.fill(printable(row["error"]), width - 4, max_lines=2), "    "))


def _connection(settings: Settings, table: str) -> Connection:
    try:
        beside(table, "parked")
    except ValueError as error:
        raise ConfigurationError(f"--table: {error}") from error
    return connect(settings.config.postgres.dsn.get_secret_value())
