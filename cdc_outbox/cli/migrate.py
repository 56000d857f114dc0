"""`cdc-outbox migrate up|status|sql`: installs sql/, then publication and slot; `migrate inbox`: a consumer's table."""

import click
import orjson
from rich.console import Console
from rich.table import Table

from cdc_outbox.cli.main import Settings
from cdc_outbox.config import Config
from cdc_outbox.errors import ConfigurationError
from cdc_outbox.inbox import schema
from cdc_outbox.operations import inbox_tables, migrations
from cdc_outbox.postgres.connection import Connection, connect

_failover = click.option("--failover", is_flag=True, help="Make a slot that standbys take over (PostgreSQL 17+).")


@click.group()
def command() -> None:
    """Install the outbox table, the publication, the relay's schema and the slot."""


@command.command()
@_failover
@click.pass_obj
def up(settings: Settings, *, failover: bool) -> None:
    """Apply what is missing. Safe to run again, and from several places at once."""
    with _connection(settings.config) as connection:
        steps: list[str] = []

        def report(step: str) -> None:
            steps.append(step)
            click.echo(step)

        migrations.up(connection, _target(settings.config), failover=failover, report=report)
        if not steps:
            click.echo("nothing to do")


@command.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def status(settings: Settings, *, as_json: bool) -> None:
    """Show which migrations this database has."""
    with _connection(settings.config) as connection:
        states = migrations.status(connection, _target(settings.config))
    if as_json:
        click.echo(orjson.dumps(states))
        return
    table = Table("migration", "state", "applied")
    for stand in states:
        table.add_row(stand.name, stand.state, f"{stand.applied_at:%Y-%m-%d %H:%M}" if stand.applied_at else "")
    Console().print(table)


@command.command()
@_failover
@click.pass_obj
def sql(settings: Settings, *, failover: bool) -> None:
    """Print what `up` would run, as a script for psql."""
    with _connection(settings.config) as connection:
        steps = migrations.plan(connection, _target(settings.config), failover=failover)
        for step in [*steps, migrations.roles_step()]:
            click.echo(f"-- {step.title}\n{step.script}\n")


@command.group()
def inbox() -> None:
    """Install the tables of a consumer's inbox.

    They go into the consumer's database, the one with the effects: postgres.dsn names it. That needs nothing of
    the relay's, and no Kafka.
    """


_inbox_table = click.option("--table", default="public.inbox", show_default=True, help="Named as in SQL.")
_partitioned = click.option(
    "--partitioned", is_flag=True, help="By commit time. Run it daily: it creates partitions for 14 days."
)


@inbox.command("up")
@_inbox_table
@_partitioned
@click.pass_obj
def inbox_up(settings: Settings, *, table: str, partitioned: bool) -> None:
    """Make the tables, and partitions if any. Safe to run again."""
    _inbox_sql(table, partitioned=partitioned)  # before a database is looked for
    steps: list[str] = []
    with _connection(settings.config) as connection:
        inbox_tables.up(connection, table, partitioned=partitioned, report=steps.append)
    click.echo("\n".join(steps or ["nothing to do"]))


@inbox.command("sql")
@_inbox_table
@_partitioned
def inbox_sql(*, table: str, partitioned: bool) -> None:
    """Print what `up` would run, as a script for psql."""
    click.echo(_inbox_sql(table, partitioned=partitioned))


def _inbox_sql(table: str, *, partitioned: bool) -> str:
    try:
        return schema.sql(table, partitioned=partitioned)
    except ValueError as error:
        raise ConfigurationError(f"--table: {error}") from error


def _connection(config: Config) -> Connection:
    return connect(config.postgres.dsn.get_secret_value())


def _target(config: Config) -> migrations.Target:
    postgres, outbox = config.postgres, config.outbox
    return migrations.Target(outbox.table, postgres.publication, postgres.slot, outbox.columns)
