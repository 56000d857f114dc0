"""`cdc-outbox demo`: the whole thing on this machine, and a verdict."""

import shlex
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import click
import orjson
from rich.console import Console
from rich.table import Table

from cdc_outbox.demo.ledger import Verdict
from cdc_outbox.demo.postgres import find_psql
from cdc_outbox.demo.relay import RelayProcess
from cdc_outbox.demo.sandbox import Sandbox
from cdc_outbox.demo.show import Show
from cdc_outbox.errors import CheckFailed


@click.command()
@click.option("--seconds", type=click.FloatRange(min=1), default=20, show_default=True, help="How long to write.")
@click.option("--keep", is_flag=True, help="Leave everything up after the verdict, until Ctrl-C.")
@click.option("--postgres", metavar="DSN", help="A PostgreSQL to use (wal_level = logical) instead of an own one.")
@click.option("--kafka", metavar="HOST:PORT", help="A Kafka to use instead of an own one.")
@click.option("--calm", is_flag=True, help="Kill nothing on the way.")
@click.option("--json", "as_json", is_flag=True, help="The verdict as one JSON document.")
def command(*, seconds: float, keep: bool, postgres: str | None, kafka: str | None, calm: bool, as_json: bool) -> None:
    """Show it: a real PostgreSQL, a real Kafka, an application that emits, the relay, a consumer that acts once.

    On the way relay and consumer are killed and started again. Without Docker, Java or root. With --postgres or --kafka
    it uses databases and topics of its own there, and removes them. Exits with 0 only if every committed event was
    delivered, in order, and no other, and the consumer acted on each once; else with 4.
    """
    console = Console(stderr=as_json)
    console.quiet = not console.is_terminal  # nothing but data in a pipe
    verdicts: list[Verdict] = []

    def at_end(verdict: Verdict, sandbox: Sandbox, relay: RelayProcess) -> None:
        verdicts.append(verdict)
        if as_json:
            click.echo(orjson.dumps({**asdict(verdict), "good": verdict.good}))
        else:
            _show_verdict(verdict)
        if keep:
            _stay(sandbox, relay)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        Show(console, dsn=postgres, bootstrap_servers=kafka, calm=calm).run(seconds, at_end)
    except KeyboardInterrupt:
        if not verdicts:
            raise CheckFailed("interrupted before there was a verdict; everything was taken down") from None
    if not verdicts[0].good:
        raise CheckFailed("not every committed event was delivered in order and acted on once: see the verdict")


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Once: what follows is the taking down, which must not be interrupted in its turn."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _show_verdict(verdict: Verdict) -> None:
    table = Table(title="verdict", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right", min_width=14)
    for name, number in asdict(verdict).items():
        table.add_row(name.replace("_", " "), f"{number:,}")
    console = Console()
    console.print(table)
    if verdict.is_delivered:
        console.print("[green]✓ every committed event was delivered, in order, and no other[/]")
    if verdict.is_acted_on_once:
        console.print("[green]✓ effects = committed events: the consumer acted on each once, in order[/]")


_STAYING = """
Everything is still up:

  PostgreSQL  {sandbox.dsn}
  Kafka       {sandbox.bootstrap_servers}, topics {sandbox.name}.*
  relay       http://{relay.address}/metrics

In another terminal:

{exports}

{program} status
{program} tail
{psql} "$CDC_OUTBOX_POSTGRES__DSN" \\
  -c "INSERT INTO outbox (aggregate_id, event_type, payload) VALUES ('run-1', 'run.created', '{{}}')"

Ctrl-C here takes everything down."""


def _program() -> str:
    """As we were started, from wherever the other terminal stands."""
    started = Path(sys.argv[0]).absolute()
    if started.name == "cdc-outbox":
        return shlex.quote(str(started))
    return f"{shlex.quote(sys.executable)} -m cdc_outbox"


def _stay(sandbox: Sandbox, relay: RelayProcess) -> None:
    environment = {**sandbox.environment, "CDC_OUTBOX_HTTP__LISTEN": relay.address}
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment.items())
    psql = shlex.quote(find_psql())
    click.echo(_STAYING.format(sandbox=sandbox, relay=relay, exports=exports, program=_program(), psql=psql))
    sys.stdout.flush()
    while not relay.ended:
        time.sleep(0.5)
