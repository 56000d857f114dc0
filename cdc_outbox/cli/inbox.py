"""`cdc-outbox inbox list|show|unpark|discard`: messages that a consumer could not handle, and what becomes of them."""

import shutil
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any, Final, TypeVar

import click
import orjson

from cdc_outbox.cli.duration import waiting
from cdc_outbox.cli.main import Settings
from cdc_outbox.cli.terminal import portable, print_field, printable
from cdc_outbox.errors import CheckFailed, ConfigurationError
from cdc_outbox.inbox.table import beside
from cdc_outbox.operations import inbox_parked
from cdc_outbox.operations.inbox_parked import ParkedMessage, Which
from cdc_outbox.postgres.connection import Connection, connect

_F = TypeVar("_F", bound=Callable[..., Any])
_ASK_SECONDS: Final = 0.2

_inbox = click.option("--table", default="public.inbox", show_default=True, help="The inbox table, with its schema.")
_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document.")
_ids = click.argument("message_ids", metavar="[ID]...", nargs=-1)
_all = click.option("--all", "every", is_flag=True, help="All that are parked, instead of those named.")


def _of_consumer(command: _F) -> _F:
    """The options that say whose messages are meant."""
    consumer = click.option("--consumer", metavar="NAME", help="Only this consumer's messages.")
    source = click.option("--source", metavar="NAME", help="Only those of this source, where consumers name sources.")
    return consumer(source(command))


@click.group()
def command() -> None:
    """Messages that a consumer could not handle: list, show, unpark, discard.

    In the consumer's database, the one with its inbox: postgres.dsn names it.
    """


@command.command("list")
@_of_consumer
@click.option("--all", "all_too", is_flag=True, help="Also those behind another, and the handled and discarded.")
@_inbox
@_as_json
@click.pass_obj
def list_(settings: Settings, /, *, all_too: bool, table: str, as_json: bool, **whose: Any) -> None:
    """List messages that wait for a decision (parked) or are being tried again (retry).

    And how many of the same key wait behind each.
    """
    with _connection(settings, table) as connection:
        rows = inbox_parked.find(connection, table, Which(**whose), all_too=all_too)
    if as_json:
        click.echo(orjson.dumps([{**asdict(row), "key": portable(row.key)} for row in rows]))
        return
    if not rows:
        click.echo("nothing is parked")
        return
    for row in rows:
        _show_row(row, shutil.get_terminal_size().columns)


@command.command()
@click.argument("message_id", metavar="ID")
@_of_consumer
@_inbox
@_as_json
@click.pass_obj
def show(settings: Settings, /, *, table: str, as_json: bool, **which: Any) -> None:
    """Show one parked message, value and all."""
    with _connection(settings, table) as connection:
        row = asdict(inbox_parked.get(connection, table, Which(**which)))
    if as_json:
        click.echo(orjson.dumps({**row, **{name: portable(row[name]) for name in ("key", "value")}}))
        return
    for name, content in row.items():
        if name == "headers":
            for header, value in content.items():
                print_field("header", f"{header}: {value}")
        elif content not in (None, ""):
            print_field(name, content)


@command.command()
@_ids
@_all
@_of_consumer
@_inbox
@waiting
@click.pass_obj
def unpark(settings: Settings, /, *, table: str, timeout: timedelta, no_wait: bool, **which: Any) -> None:
    """Ask the running consumer to handle parked messages again, and after each what waits behind it, in order.

    Waits for the outcome, and exits with 4 if a message failed again or nobody took it.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    with _connection(settings, table) as connection:
        asked = [inbox_parked.unpark(connection, table, each) for each in _named(connection, table, **which)]
        if no_wait:
            click.echo(f"asked for {len(asked)} to be handled again")
            return
        failures = [text for row in asked if (text := _outcome(connection, table, row, deadline))]
    if failures:
        raise CheckFailed("; ".join(failures), hint="`cdc-outbox inbox list` shows what is parked")


@command.command()
@_ids
@_all
@_of_consumer
@_inbox
@click.pass_obj
def discard(settings: Settings, /, *, table: str, **which: Any) -> None:
    """Give parked messages up: they will never be handled. What waits behind them goes on."""
    with _connection(settings, table) as connection:
        for each in _named(connection, table, **which):
            row = inbox_parked.discard(connection, table, each)
            click.echo(f"message {printable(repr(row.message_id))} discarded")


def _named(
    connection: Connection, table: str, *, message_ids: tuple[str, ...], every: bool, **whose: Any
) -> list[Which]:
    if every == bool(message_ids):
        raise ConfigurationError("name messages by their ids, or say --all")
    if not every:
        return [Which(message_id, **whose) for message_id in message_ids]
    rows = inbox_parked.find(connection, table, Which(**whose), all_too=False)
    named = [_which(row) for row in rows if row.state == "parked"]
    if not named:
        click.echo("nothing is parked" + (f"; {len(rows)} are being tried again" if rows else ""))
    return named


def _which(row: ParkedMessage) -> Which:
    return Which(row.message_id, row.consumer, row.source)


def _outcome(connection: Connection, table: str, asked: ParkedMessage, deadline: float) -> str:
    """Says what became of it; returns why that is not what was asked for."""
    name = printable(repr(asked.message_id))
    while True:
        row = inbox_parked.get(connection, table, _which(asked))
        if row.state in ("handled", "discarded"):
            click.echo(f"message {name} {row.state}" + (f"; {asked.behind} behind it" if asked.behind else ""))
            return ""
        if row.state == "parked":
            return f"message {name} failed again: {printable(row.error or '')}"
        if time.monotonic() > deadline:
            return f"message {name} was not handled in time: does its consumer run? The request stands"
        time.sleep(_ASK_SECONDS)


def _show_row(row: ParkedMessage, width: int) -> None:
    """Three lines, not a line of a table: an id and an error are long, and both are needed whole."""
    behind = f", behind it: {row.behind}" if row.behind else ""
    click.echo(f"{printable(row.message_id)}  {row.state} (attempts: {row.attempts}{behind})")
    key = f", key {printable(row.key)}" if row.key is not None else ""
    click.echo(f"    {row.consumer}: {row.topic}[{row.partition}]@{row.offset}{key}")
    if row.error:
        click.echo(textwrap.indent(textwrap.fill(printable(row.error), width - 4, max_lines=2), "    "))


def _connection(settings: Settings, table: str) -> Connection:
    try:
        beside(table, "parked")
    except ValueError as error:
        raise ConfigurationError(f"--table: {error}") from error
    return connect(settings.config.postgres.dsn.get_secret_value())
