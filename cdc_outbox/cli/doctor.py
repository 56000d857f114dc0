"""`cdc-outbox doctor`: checks everything `run` needs, and says how to fix each thing that is wrong."""

from collections import Counter
from dataclasses import asdict
from typing import Final

import click
import orjson

from cdc_outbox.cli.main import Settings
from cdc_outbox.errors import CheckFailed
from cdc_outbox.operations.doctor import run_checks
from cdc_outbox.operations.findings import Finding, State

_LOOK: Final[dict[State, tuple[str, str]]] = {
    "ok": ("ok", "green"),
    "warning": ("warning", "yellow"),
    "failed": ("FAILED", "red"),
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def command(settings: Settings, *, as_json: bool) -> None:
    """Check everything `run` needs, and say how to fix what is wrong.

    Changes nothing, except that it sends one canary, and creates the canary's topic if it is missing. Run it as the
    same user and on the same machine as `run`. Exit code 4 if anything failed; a warning is no failure.
    """
    findings: list[Finding] = []
    for finding in run_checks(settings.config):
        findings.append(finding)
        if not as_json:
            _show(finding)
    count = Counter(finding.state for finding in findings)
    if as_json:
        click.echo(orjson.dumps({"findings": [asdict(finding) for finding in findings], "failed": count["failed"]}))
    else:
        click.echo(f"\n{count['ok']} ok, {count['warning']} to think about, {count['failed']} failed")
    if count["failed"]:
        raise CheckFailed(f"{count['failed']} of {len(findings)} checks failed")


def _show(finding: Finding) -> None:
    word, color = _LOOK[finding.state]
    click.echo(
        f"{click.style(f'{word:>7}', fg=color, bold=finding.state == 'failed')}  {finding.check}: {finding.found}"
    )
    if finding.hint:
        click.echo(f"         hint: {finding.hint}")
