"""`cdc-outbox status`: what PostgreSQL says of the slot, and what the running relay says of itself."""

from dataclasses import asdict
from datetime import timedelta
from typing import Any, Final

import click
import orjson
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cdc_outbox.cli.duration import Duration
from cdc_outbox.cli.main import Settings
from cdc_outbox.cli.terminal import printable
from cdc_outbox.config import Config
from cdc_outbox.operations.dead_letters import count_waiting
from cdc_outbox.operations.event_status import StuckRow, count_unknown, stuck_rows
from cdc_outbox.operations.policy import Activation, in_force
from cdc_outbox.postgres.catalog import find_table
from cdc_outbox.postgres.connection import connect
from cdc_outbox.postgres.slots import Slot, check_slot
from cdc_outbox.service.readiness import ask_readyz

_TIMEOUT_SECONDS: Final = 2.0
#: How to see the rows of which it cannot be told whether they were published.
_UNKNOWN: Final = "SELECT * FROM cdc_outbox.event_status WHERE state = 'unknown'"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option("--stuck", "patience", type=Duration(), help="List rows committed so long ago and not yet published.")
@click.pass_obj
def command(settings: Settings, *, as_json: bool, patience: timedelta | None) -> None:
    """Show slot, lag, readiness and last errors.

    The slot's figures come from PostgreSQL, readiness and errors from the relay's /readyz at http.listen. --stuck reads
    the outbox, so it needs a role with SELECT on it, which the relay's own does not have. It also counts the rows whose
    state is unknown.
    """
    config = settings.config
    if patience is not None:
        _show_stuck(config, patience, as_json=as_json)
        return
    with connect(config.postgres.dsn.get_secret_value()) as connection:
        slot = check_slot(connection, config.postgres.slot)
        waiting = count_waiting(connection)
        policy = in_force(connection, config.postgres.slot)
    relay = ask_readyz(config.http.listen, timeout_seconds=_TIMEOUT_SECONDS) if config.http.listen else None
    if as_json:
        shown = {**asdict(slot), "confirmed_lsn": str(slot.confirmed_lsn) if slot.confirmed_lsn is not None else None}
        governed = {"sha256": policy.sha256, "lsn": policy.lsn, "at": policy.at} if policy else None
        click.echo(orjson.dumps({"slot": shown, "relay": relay, "dead_letters": waiting, "policy": governed}))
    else:
        _show(slot, relay, waiting, policy, config)


def _show_stuck(config: Config, patience: timedelta, *, as_json: bool) -> None:
    with connect(config.postgres.dsn.get_secret_value()) as connection:
        table = find_table(connection, config.outbox.table)
        count, rows = stuck_rows(connection, table, config.outbox.columns, config.postgres.slot, patience=patience)
        if not as_json:
            _show_stuck_rows(count, rows)
        unknown = count_unknown(connection, config.postgres.slot)
    if as_json:
        click.echo(orjson.dumps({"stuck": count, "rows": rows, "unknown": unknown}))
    elif unknown:
        click.echo(
            f"of {unknown} rows it cannot be told whether they were published (written before the slot, or while they "
            f"were not sent): {_UNKNOWN}"
        )


def _show_stuck_rows(count: int, rows: list[StuckRow]) -> None:
    if not count:
        click.echo("nothing is stuck")
        return
    table = Table("outbox id", "aggregate", "event type", "age")
    for row in rows:
        age = "?" if row.seconds is None else str(timedelta(seconds=int(row.seconds)))
        told = (row.outbox_id, row.aggregate_id, row.event_type)
        table.add_row(*(Text(printable(value)) for value in told), age)
    Console().print(table)
    more = f" (the oldest {len(rows)} are shown)" if count > len(rows) else ""
    click.echo(f"{count} stuck{more}")


def _show(
    slot: Slot, relay: dict[str, Any] | None, waiting: int | None, policy: Activation | None, config: Config
) -> None:
    table = Table(show_header=False)
    table.add_row("slot", slot.name)
    table.add_row("held by", f"walsender {slot.active_pid}" if slot.active_pid else "[yellow]nobody[/]")
    table.add_row("confirmed", str(slot.confirmed_lsn))
    table.add_row("lag", _bytes(slot.lag_bytes))
    table.add_row("WAL kept", f"{_bytes(slot.retained_bytes)} ({slot.wal_status})")
    table.add_row("WAL until lost", "unlimited" if slot.safe_bytes is None else _bytes(slot.safe_bytes))
    if waiting:
        table.add_row("dead letters", f"[yellow]{waiting}[/] wait for a decision: cdc-outbox dead-letters list")
    if policy:
        who = f"{(policy.sha256 or '')[:12]} since {policy.at:%Y-%m-%d %H:%M}, by {policy.principal}"
        table.add_row("policy", escape(printable(who)))
    if relay is None:
        table.add_row("relay", f"[yellow]no answer at {config.http.listen or 'http.listen (turned off)'}[/]")
    else:
        color = "green" if relay["ready"] else "yellow"
        table.add_row("relay", f"[{color}]{relay['state']}[/] {escape(relay['reason'])}")
        table.add_row("oldest unconfirmed", f"{relay['oldest_unconfirmed_seconds']} s")
        for error in relay["last_errors"]:
            table.add_row("last error", escape(f"{error['error']} {error['hint']}"))
    Console().print(table)


def _bytes(count: int | None) -> str:
    return "?" if count is None else decimal(count)
