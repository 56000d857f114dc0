"""`cdc-outbox policy check|activate|show|log`: the policy between commit and dispatch."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Final

import click
import orjson
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cdc_outbox.cli.duration import waiting
from cdc_outbox.cli.main import Settings
from cdc_outbox.cli.terminal import print_field, printable
from cdc_outbox.errors import CheckFailed
from cdc_outbox.operations import policy
from cdc_outbox.operations.policy import Activation, Checked
from cdc_outbox.operations.requests import await_outcome
from cdc_outbox.postgres.connection import Connection, connect
from cdc_outbox.service import logs

_file = click.argument("file", type=click.Path(path_type=Path))
_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document.")
_UNCHANGED: Final = "what was in force before stays so; see: cdc-outbox policy log"
_HINT: Final = "each mistake stands above, with its line"


@click.group()
def command() -> None:
    """The policy: what may go to Kafka, what waits for somebody's approval, what stays inside."""


@command.command()
@_file
@_as_json
def check(*, file: Path, as_json: bool) -> None:
    """Read a policy file: say what is wrong with it, and warn of what is suspicious. Needs no database.

    Exits with 4 if the relay would not take it.
    """
    checked = policy.check(file, policy.read_source(file))
    if as_json:
        click.echo(orjson.dumps(checked))
    else:
        _say(checked)
    _refuse_mistakes(checked, hint="" if as_json else _HINT)
    if not as_json:
        click.echo(f"{file}: in order, {checked.rules} rules, SHA-256 {checked.sha256}")


@command.command()
@_file
@click.option("--reason", required=True, help="Why; kept with the policy.")
@waiting
@click.pass_obj
def activate(settings: Settings, *, file: Path, reason: str, timeout: timedelta, no_wait: bool) -> None:
    """Put a policy in force: the running relay judges by it from its place in the log on.

    To go back, activate an older one. Waits for the outcome, and exits with 4 if no relay took the request in time, or
    if the relay refused it: the one before then stays in force.
    """
    until = time.monotonic() + timeout.total_seconds()
    source = policy.read_source(file)
    checked = policy.check(file, source)
    _say(checked)
    _refuse_mistakes(checked, hint=_HINT)
    publication, slot = settings.config.postgres.publication, settings.config.postgres.slot
    with _connect(settings) as connection:
        request = policy.request_activation(connection, publication, slot, source, reason)
        if no_wait:
            click.echo(f"policy {checked.sha256} requested")
            return
        outcome = await_outcome(connection, request, until=until)
        if outcome is None:
            what = f"policy {file} was not activated in time: does the relay run? Request {request} stands"
            raise CheckFailed(what, hint="see: cdc-outbox policy log")
        if outcome.result != "activated":
            raise CheckFailed(f"policy {file} was refused: {printable(outcome.detail)}", hint=_UNCHANGED)
    click.echo(f"policy {checked.sha256} is in force")


@command.command()
@_as_json
@click.pass_obj
def show(settings: Settings, *, as_json: bool) -> None:
    """Show the policy in force, as it was activated."""
    with _connect(settings) as connection:
        found = policy.in_force(connection, settings.config.postgres.slot)
    if as_json:
        click.echo(orjson.dumps(found))
    elif found is None:
        click.echo("no policy is in force: every event may go to Kafka")
    else:
        for name in ("sha256", "lsn", "at", "principal", "reason"):
            print_field(name, getattr(found, name))
        click.echo("\n" + printable((found.source or "").rstrip()))


@command.command("log")
@_as_json
@click.pass_obj
def log_(settings: Settings, *, as_json: bool) -> None:
    """List the policies that were asked for, the latest first, and what came of each."""
    with _connect(settings) as connection:
        found = policy.activations(connection, settings.config.postgres.slot)
    if as_json:
        click.echo(orjson.dumps(found))
    elif found:
        Console().print(_table(found))
    else:
        click.echo("no policy was ever asked for")


def _table(activations: list[Activation]) -> Table:
    table = Table("at", "state", "sha256", "by", "reason", box=box.SIMPLE_HEAD, pad_edge=False)
    for each in activations:
        said = f"{each.reason} ({each.detail})" if each.detail else each.reason
        shown = (f"{each.at:%m-%d %H:%M:%S}", each.state, (each.sha256 or "")[:12], each.principal, said)
        table.add_row(*(Text(printable(cell)) for cell in shown))
    return table


def _say(checked: Checked) -> None:
    for mistake in checked.mistakes:
        logs.say(printable(f"{checked.file}:{mistake}"))
    for warning in checked.warnings:
        logs.say(printable(f"{checked.file}:{warning.line}: warning: rule {warning.rule}: {warning.message}"))


def _refuse_mistakes(checked: Checked, *, hint: str) -> None:
    if count := len(checked.mistakes):
        raise CheckFailed(f"policy {checked.file} has {count} mistake{'s' * (count != 1)}", hint=hint)


def _connect(settings: Settings) -> Connection:
    return connect(settings.config.postgres.dsn.get_secret_value())
