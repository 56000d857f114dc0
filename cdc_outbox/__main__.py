"""`python -m cdc_outbox`: the same as the installed command."""

from cdc_outbox.cli.main import main

main(prog_name="cdc-outbox")
