"""The command line: global options, the verbs (one file each, loaded when called), and exit codes.

Exit codes: 0 clean, 1 a bug of ours (with a traceback), 2 usage or configuration, 3 an operator is needed, 4 a check
failed. A failure is one line on standard error that names the thing and how to fix it.
"""

import errno
import gc
import os
import sys
import traceback
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Final, cast

import click

from cdc_outbox import __version__
from cdc_outbox.config import Config, load_config
from cdc_outbox.errors import CdcOutboxError, OperatorNeeded
from cdc_outbox.service import logs

_VERBS: Final = {
    "migrate": "Install the outbox table, the publication, the relay's schema and the slot.",
    "run": "Relay: tail the log, publish, confirm. Reconnects by itself.",
    "tail": "Print events as they commit; confirms nothing on the real slot.",
    "status": "Show slot, lag, readiness and last errors.",
    "doctor": "Check everything `run` needs, and say how to fix what is wrong.",
    "prune": "Delete rows of the outbox that are known to be published.",
    "topics": "List the topics that events ask for; create those that are missing.",
    "dead-letters": "List, show, redrive or discard events that could not be published.",
    "inbox": "List, show, unpark or discard messages that a consumer could not handle.",
    "holds": "List or show events that the policy keeps inside.",
    "policy": "Check, activate or show the policy that decides what may go to Kafka.",
    "config": "Show the configuration that is in force.",
    "demo": "Show it all on this machine: PostgreSQL, Kafka, a writer, the relay, a verdict.",
}


@dataclass
class Settings:
    """What the global options say; the configuration is read when a verb asks for it."""

    config_path: Path | None

    @cached_property
    def config(self) -> Config:
        return load_config(self.config_path)


class _Verbs(click.Group):
    """Loads a verb's module when it is called: `run` starts without what only `demo` needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _VERBS:
            return None
        command = import_module(f"cdc_outbox.cli.{cmd_name.replace('-', '_')}").command
        # What is loaded by now stays for good: the collector need not walk it again and again in the hot loop.
        gc.freeze()
        gc.enable()
        return cast("click.Command", command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(_VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CdcOutboxError as error:
            _say(ctx, error)
            ctx.exit(error.exit_code)

    def main(self, *args: Any, **keywords: Any) -> Any:
        _open_standard_streams()
        try:
            return super().main(*args, **keywords)
        except OSError as error:
            if error.errno in (None, errno.EPIPE) or not _is_of_output(error):
                raise
            logs.say(f"error: standard output cannot be written to: {os.strerror(error.errno).lower()}")
            sys.exit(OperatorNeeded.exit_code)


def _open_standard_streams() -> None:
    """Those that the caller has closed: another file, or a database's socket, would get their numbers."""
    while (lowest := os.open(os.devnull, os.O_RDWR)) <= logs.STDERR:
        pass
    os.close(lowest)
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 - as long as the process
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115


def _is_of_output(error: OSError) -> bool:
    """Whether it was raised where something was printed, and not where a file was written."""
    frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in ("click", "rich")


def _say(ctx: click.Context, error: CdcOutboxError) -> None:
    if ctx.params["log_format"] == "json":
        logs.get_logger().error("failed", error=error.message, hint=error.hint, exit_code=error.exit_code)
    else:
        hint = f" -- {error.hint}" if error.hint else ""
        logs.say(f"error: {error.message}{hint}")


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cdc-outbox")
@click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="CDC_OUTBOX_CONFIG",
    help="TOML file; default ./cdc-outbox.toml if it is there.",
)
@click.option(
    "--log-format",
    type=click.Choice(["console", "json"]),
    default="console",
    envvar="CDC_OUTBOX_LOG_FORMAT",
    show_default=True,
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
    default="info",
    envvar="CDC_OUTBOX_LOG_LEVEL",
    show_default=True,
)
@click.pass_context
def main(ctx: click.Context, config_path: Path | None, log_format: logs.LogFormat, log_level: str) -> None:
    """Carry committed outbox rows from PostgreSQL's write-ahead log to Kafka: all of them, in order.

    Every key of the configuration can be set as CDC_OUTBOX_<SECTION>__<KEY>.
    """
    logs.configure(log_format, log_level)
    ctx.obj = Settings(config_path)
