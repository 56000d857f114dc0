"""`cdc-outbox run`: the service."""

import click

from cdc_outbox.cli.main import Settings
from cdc_outbox.service.process import serve


@click.command()
@click.pass_obj
def command(settings: Settings) -> None:
    """Relay: tail the log, publish, confirm.

    Reconnects by itself and stands by while another relay has the slot. SIGTERM, SIGINT or SIGHUP: publish what was
    read, confirm it, exit 0; a second SIGTERM or SIGINT ends at once.
    """
    serve(settings.config)
