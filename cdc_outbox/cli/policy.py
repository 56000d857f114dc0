"""`cdc-outbox policy check`: the policy between commit and dispatch."""

from pathlib import Path
from typing import Final

import click
import orjson

from cdc_outbox.cli.terminal import printable
from cdc_outbox.errors import CheckFailed
from cdc_outbox.operations import policy
from cdc_outbox.service import logs

_file = click.argument("file", type=click.Path(path_type=Path))
_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document.")
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
    for mistake in [] if as_json else checked.mistakes:
        logs.say(printable(f"{file}:{mistake}"))
    for warning in [] if as_json else checked.warnings:
        logs.say(printable(f"{file}:{warning.line}: warning: rule {warning.rule}: {warning.message}"))
    if checked.mistakes:
        count = len(checked.mistakes)
        raise CheckFailed(f"policy {file} has {count} mistake{'s' * (count != 1)}", hint="" if as_json else _HINT)
    if not as_json:
        click.echo(f"{file}: in order, {checked.rules} rules, SHA-256 {checked.sha256}")
