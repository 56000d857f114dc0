"""`cdc-outbox config show`: the configuration in force, without its secrets."""

from contextlib import suppress

import click
import orjson

from cdc_outbox.cli.main import Settings
from cdc_outbox.config import redacted
from cdc_outbox.errors import ConfigurationError
from cdc_outbox.postgres.connection import without_secrets


@click.group()
def command() -> None:
    """Show the configuration that is in force."""


@command.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def show(settings: Settings, *, as_json: bool) -> None:
    """Every key with its value, from file, environment and defaults; secrets as ***."""
    values = redacted(settings.config)
    with suppress(ConfigurationError):  # of what is no DSN nothing can be shown
        values["postgres.dsn"] = without_secrets(settings.config.postgres.dsn.get_secret_value())
    if as_json:
        click.echo(orjson.dumps(values))
        return
    for key, value in values.items():
        click.echo(f"{key} = {orjson.dumps(value).decode()}")
