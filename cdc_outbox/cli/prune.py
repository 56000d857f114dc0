"""`cdc-outbox prune`: keeps the outbox small; deletes rows that are known to be published."""

from datetime import timedelta

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from cdc_outbox.cli.duration import Duration
from cdc_outbox.cli.main import Settings
from cdc_outbox.operations.pruning import prune
from cdc_outbox.postgres.catalog import find_table
from cdc_outbox.postgres.connection import connect
from cdc_outbox.service.logs import say


@click.command()
@click.option("--older-than", type=Duration(), required=True, help="Published at least so long ago, e.g. 12h or 7d.")
@click.pass_obj
def command(settings: Settings, *, older_than: timedelta) -> None:
    """Delete rows of the outbox that are known to be published; of one partitioned by time, whole partitions.

    Needs a role with DELETE on the outbox, which the relay's own does not have: set CDC_OUTBOX_POSTGRES__DSN.
    """
    config = settings.config
    with connect(config.postgres.dsn.get_secret_value(), application_name="cdc-outbox prune") as connection:
        table = find_table(connection, config.outbox.table)
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(escape(f"pruning {table}"), total=None)
            pruned = prune(
                connection,
                table,
                config.outbox.columns.of(table.columns)["id"],
                config.postgres.slot,
                older_than=older_than,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    for partition in pruned.partitions:
        click.echo(f"dropped partition {partition}")
    for partition in pruned.busy:
        say(f"partition {partition} is in use and stays for now")
    click.echo(f"{pruned.rows} rows pruned from {table}")
