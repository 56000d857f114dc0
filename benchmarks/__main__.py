"""`python -m benchmarks`: what a relay costs and how far behind it falls, on this machine, beside its peers."""

import random
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import click
import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.arena import Arena, open_arena
from benchmarks.charts import draw
from benchmarks.drain import Incomplete, drain
from benchmarks.lane import Backlog
from benchmarks.latency import measure_latency
from benchmarks.libraries import measure_consume, measure_emit, measure_inbox
from benchmarks.lives import measure_crash, measure_huge, measure_idle, measure_start
from benchmarks.peers import BY_DEFAULT, NAMES, WITHOUT_JAVA, Unavailable, make_peer
from benchmarks.report import US, Growth, Report

DRAINS: Final = {
    "drain-bulk": Backlog(400_000, 100),
    "drain-single": Backlog(300_000, 1),
    "drain-bulk-jsonb": Backlog(400_000, 100, payload_type="jsonb"),
}
OTHERS: Final = ("latency", "start", "crash", "huge", "idle", "growth", "emit", "inbox", "consume")
_RATES: Final = (50, 500, 5000)
#: The quick form divides events by this: enough to see that the harness works, too little for a figure.
_QUICK: Final = 200

Step = tuple[str, Callable[[], None]]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--scenario", "scenarios", multiple=True, type=click.Choice([*DRAINS, *OTHERS]), help="Default: all.")
@click.option(
    "--peer", "peers", multiple=True, type=click.Choice(NAMES), help="For the drains. Default: all but the traced ones."
)
@click.option("--repeat", type=int, help="Runs of each, in random order. Default: 3, or 1 of the quick form.")
@click.option("--postgres", metavar="DSN", help="A superuser's; default: the embedded one.")
@click.option("--kafka", metavar="HOST:PORT", help="Default: the embedded one.")
@click.option("--quick", is_flag=True, help="Under a minute: shows that the harness works, measures nothing.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path, allow_dash=True))
@click.option("--charts", type=click.Path(file_okay=False, path_type=Path), help="Folder for PNG and SVG.")
def main(
    scenarios: tuple[str, ...],
    peers: tuple[str, ...],
    repeat: int | None,
    postgres: str | None,
    kafka: str | None,
    json_file: Path | None,
    charts: Path | None,
    *,
    quick: bool,
) -> None:
    """Measure the relay, and its peers side by side, on real servers.

    Fails if anything is missing or out of order in what a consumer received. A peer of which that is true is left out.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers and peers go, whoever ends it
    console = Console(stderr=str(json_file) == "-")
    failure: Incomplete | None = None
    repeat = repeat or (1 if quick else 3)
    peers = peers or (WITHOUT_JAVA if quick else BY_DEFAULT)
    with open_arena(postgres, kafka, patience_seconds=60 if quick else 600) as arena:
        report = Report({**arena.conditions(), "repeat": repeat, "quick": quick})
        steps = _plan(arena, report, scenarios or (*DRAINS, *OTHERS), peers, repeat, quick=quick)
        try:
            _carry_out(steps, console)
        except Incomplete as error:  # what was measured before it still counts
            failure = error
    if not quick:
        report.show(console)
    elif not failure:
        left_out = "".join(f"; left out: {peer} ({why})" for peer, why in report.left_out.items())
        console.print(f"{len(steps)} runs, nothing missing, nothing out of order{left_out}")
    if json_file:
        text = orjson.dumps(report.as_json(), option=orjson.OPT_INDENT_2)
        sys.stdout.buffer.write(text) if str(json_file) == "-" else json_file.write_bytes(text)
    if charts:
        for file in draw(report, charts):
            console.print(f"drawn: {file}")
    if failure:
        console.print(f"[red]failed: {failure}[/]")
        sys.exit(4)


def _plan(
    arena: Arena, report: Report, scenarios: tuple[str, ...], peers: tuple[str, ...], repeat: int, *, quick: bool
) -> list[Step]:
    shrink = _QUICK if quick else 1
    steps: list[Step] = []
    for scenario in (name for name in DRAINS if name in scenarios):
        backlog = _shrunk(DRAINS[scenario], shrink)
        runs = [(scenario, peer, backlog) for peer in peers for _ in range(repeat)]
        random.shuffle(runs)  # what the machine does meanwhile must not fall on one peer
        steps += [(f"{scenario}: {peer}", _drain_step(arena, report, name, peer, it)) for name, peer, it in runs]
    if "latency" in scenarios:
        for rate in _RATES:
            seconds = 2 if quick else 20
            steps.append(
                (f"latency at {rate}/s", lambda r=rate, s=seconds: report.latency.append(measure_latency(arena, r, s)))  # type: ignore[misc]
            )
    single: dict[str, Callable[[], None]] = {
        "start": lambda: report.start.append(measure_start(arena)),
        "crash": lambda: report.crash.append(measure_crash(arena, 400_000 // shrink)),
        "huge": lambda: report.huge.append(measure_huge(arena, 1_000_000 // shrink)),
        "idle": lambda: report.idle.append(measure_idle(arena, 2 if quick else 60)),
    }
    steps += [(name, step) for name, step in single.items() if name in scenarios for _ in range(_times(name, repeat))]
    if "growth" in scenarios:
        steps += _growth_steps(arena, report, shrink)
    if "emit" in scenarios:
        steps.append(("emit", lambda: report.emit.extend(measure_emit(arena, 1_000 // shrink))))
    if "inbox" in scenarios:
        steps.append(("inbox", lambda: report.inbox.extend(measure_inbox(arena, 1_000 // shrink))))
    if "consume" in scenarios:
        steps.append(("consume", lambda: report.consume.extend(measure_consume(arena, 20_000 // shrink, repeat))))
    return steps


def _times(name: str, repeat: int) -> int:
    """Long or steady ones once; a start or a crash is chance."""
    return repeat if name in ("start", "crash") else 1


def _shrunk(backlog: Backlog, shrink: int) -> Backlog:
    """At least one transaction, and whole ones."""
    events = max(backlog.per_transaction, backlog.events // shrink)
    return replace(backlog, events=events - events % backlog.per_transaction)


def _drain_step(arena: Arena, report: Report, scenario: str, peer: str, backlog: Backlog) -> Callable[[], None]:
    def step() -> None:
        if peer in report.left_out:
            return
        try:
            drained = drain(arena, make_peer(peer), backlog)
        except Unavailable as error:
            report.left_out[peer] = str(error)
        except Incomplete as error:
            if peer == US:
                raise
            report.left_out[peer] = str(error)
        else:
            report.drains[scenario].append(drained)

    return step


def _growth_steps(arena: Arena, report: Report, shrink: int) -> list[Step]:
    base = Backlog(100_000, 100)
    series = {
        "backlog": [(factor, replace(base, events=base.events * factor)) for factor in (1, 2, 4, 8)],
        "aggregates": [(count, replace(base, aggregates=count)) for count in (1, 10, 100, 1000)],
        "payload bytes": [
            (size, replace(base, events=max(4_000, min(100_000, 200_000_000 // size)), payload_bytes=size))
            for size in (100, 1_000, 10_000, 100_000)
        ],
    }
    if shrink > 1:
        series = {what: [of[0], of[-1]] for what, of in series.items()}

    def step(what: str, value: int, backlog: Backlog) -> Step:
        return f"growth: {what} {value}", lambda: report.growth.append(
            Growth(what, value, drain(arena, make_peer(US), _shrunk(backlog, shrink)))
        )

    return [step(what, value, backlog) for what, steps in series.items() for value, backlog in steps]


def _carry_out(steps: list[Step], console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(steps))
        for name, step in steps:
            progress.update(task, description=name)
            if not console.is_terminal:
                click.echo(name, err=True)  # where it stands, should somebody end it
            step()
            progress.advance(task)


if __name__ == "__main__":
    main()
