"""`cdc-outbox policy check|test|activate|show|log|explain`: the policy between commit and dispatch."""

import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Final

import click
import orjson
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from cdc_outbox.cli.duration import waiting
from cdc_outbox.cli.main import Settings
from cdc_outbox.cli.terminal import print_field, printable
from cdc_outbox.errors import CheckFailed, ConfigurationError
from cdc_outbox.operations import policy
from cdc_outbox.operations.policy import Activation, Checked
from cdc_outbox.operations.policy_trial import Trial, find_event, try_on_rows
from cdc_outbox.operations.requests import await_outcome
from cdc_outbox.postgres.connection import Connection, connect
from cdc_outbox.relay.policy.conditions import ORIGINS
from cdc_outbox.relay.policy.document import Policy, read_policy
from cdc_outbox.relay.policy.explain import Explanation, explain
from cdc_outbox.service import logs

_file = click.argument("file", type=click.Path(path_type=Path))
_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document.")
_UNCHANGED: Final = "what was in force before stays so; see: cdc-outbox policy log"
#: In the place of a file's name.
_IN_FORCE: Final = Path("the policy in force")
_SAMPLES: Final = "the table shows rules and an event of each; --json more"
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


@command.command("test")
@_file
@click.option("--fail-on", type=click.Choice(["looser", "stricter"]), help="Exit with 4 if an event is treated so.")
@_as_json
@click.pass_obj
def test_(settings: Settings, *, file: Path, fail_on: str | None, as_json: bool) -> None:
    """Judge all rows of the outbox by a policy, and by the one in force beside it. Changes nothing.

    What is throttled is simulated on commit times. Reads the outbox: needs a role with SELECT on it, which the relay's
    own does not have.
    """
    candidate = _read(file, policy.read_source(file))
    console = Console(stderr=True)
    with (
        _connect(settings) as connection,
        Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        active = policy.in_force(connection, settings.config.postgres.slot)
        task = bar.add_task("judging rows", total=None)
        trial = try_on_rows(
            connection,
            settings.config,
            candidate,
            _read(_IN_FORCE, (active.source or "").encode()) if active else None,
            lambda rows: bar.update(task, completed=rows, description=f"judging rows: {rows:,}"),
        )
    if as_json:
        click.echo(orjson.dumps({**asdict(trial), "stricter": trial.stricter, "looser": trial.looser}))
    else:
        _show_trial(trial, than="the policy in force" if active else "no policy")
    if fail_on and (count := getattr(trial, fail_on)):
        raise CheckFailed(f"{count} events are treated {fail_on} than now", hint=_SAMPLES)


def _show_trial(trial: Trial, *, than: str) -> None:
    table = Table(
        "rule", "verdict", "events", "errors", "stricter", "looser", "e.g.", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for tally in sorted(trial.rules, key=lambda tally: -tally.events):
        counts = (str(count or "") for count in (tally.events, tally.errors, tally.stricter, tally.looser))
        sample = (tally.looser_samples or tally.samples)[0]
        table.add_row(tally.rule or "(default)", tally.verdict, *counts, Text(printable(sample), overflow="ellipsis"))
    if trial.rules:
        Console().print(table)
    for tally in trial.rules:
        if tally.verdict == "throttle":
            longest = f"{tally.longest_wait_seconds:.0f} s at most"
            click.echo(f"{tally.rule}: {tally.waiting} would wait, {longest}; {tally.denied} would be denied")
    for rule, count in trial.watched.items():
        click.echo(f"{rule}: would take {count} (mode watch)")
    unroutable = f"; {trial.unroutable} could never be published" if trial.unroutable else ""
    click.echo(f"{trial.rows:,} rows: {trial.stricter} stricter, {trial.looser} looser than {than}{unroutable}")


@command.command("explain")
@click.argument("event_id")
@click.option("--file", type=click.Path(path_type=Path), help="By this policy instead of the one in force.")
@click.option("--origin", type=click.Choice(ORIGINS), default="outbox", show_default=True, help="As if it came so.")
@_as_json
@click.pass_obj
def explain_(settings: Settings, *, event_id: str, file: Path | None, origin: str, as_json: bool) -> None:
    """Say why an event of the outbox is judged as it is: each condition of each rule up to the one that decides.

    Needs a role with SELECT on the outbox.
    """
    with _connect(settings) as connection:
        found = policy.in_force(connection, settings.config.postgres.slot) if file is None else None
        event = find_event(connection, settings.config, event_id)
    if file is None and found is None:
        raise ConfigurationError("no policy is in force", hint="name one with --file")
    source = policy.read_source(file) if file else (found.source or "").encode() if found else b""
    read = _read(file or _IN_FORCE, source)
    told = list(explain(read, replace(event, origin=origin)))
    if as_json:
        click.echo(
            orjson.dumps({"rules": told, "default": None if told and told[-1].decides else read.default.verdict})
        )
        return
    for each in told:
        _show_explanation(each, read.on_error.verdict)
    if not told or not told[-1].decides:
        click.echo(f"no rule decides: {read.default.verdict}")


def _show_explanation(told: Explanation, on_error: str) -> None:
    said = {True: "matches", False: "does not match", None: "cannot be evaluated"}[told.matches]
    then = {True: told.verdict, False: "", None: f"{on_error} (on_error)"}[told.matches]
    watch = " (mode watch)" if told.is_watched else ""
    click.echo(f"{told.line}: rule {told.rule}{watch} {said}{f': {then}' if then else ''}")
    for answer in told.answers:
        mark = {True: "yes", False: "no", None: "?"}[answer.holds]
        wanted = orjson.dumps(answer.wanted, default=str).decode()
        click.echo(printable(f"    {mark:>3}  {answer.clause} {answer.field} = {wanted}"))


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


def _read(file: Path, source: bytes) -> Policy:
    """Raises CheckFailed, after it has said what is wrong."""
    checked = policy.check(file, source)
    _say(checked)
    _refuse_mistakes(checked, hint=_HINT)
    return read_policy(source)


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
