"""The report: every run as it was measured, medians and spread for people, everything in JSON for machines."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.drain import Drained
from benchmarks.latency import Latency
from benchmarks.libraries import Overhead, Rate
from benchmarks.lives import Crash, Huge, Idle, Start

US: Final = "cdc-outbox"


@dataclass(slots=True)
class Growth:
    """Drains of our relay that differ in one thing; cost per event should not."""

    what: str
    value: int
    drained: Drained


@dataclass(slots=True)
class Report:
    conditions: dict[str, Any]
    drains: defaultdict[str, list[Drained]] = field(default_factory=lambda: defaultdict(list))
    latency: list[Latency] = field(default_factory=list)
    start: list[Start] = field(default_factory=list)
    crash: list[Crash] = field(default_factory=list)
    huge: list[Huge] = field(default_factory=list)
    idle: list[Idle] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    emit: list[Overhead] = field(default_factory=list)
    inbox: list[Overhead] = field(default_factory=list)
    consume: list[Rate] = field(default_factory=list)
    #: peers that could not run, and why
    left_out: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "conditions": self.conditions,
            "drains": {scenario: [run.as_json() for run in runs] for scenario, runs in self.drains.items()},
            "latency": [asdict(it) for it in self.latency],
            "start": [asdict(it) for it in self.start],
            "crash": [asdict(it) for it in self.crash],
            "huge": [asdict(it) for it in self.huge],
            "idle": [asdict(it) for it in self.idle],
            "growth": [{"what": it.what, "value": it.value, **it.drained.as_json()} for it in self.growth],
            "emit": [asdict(it) for it in self.emit],
            "inbox": [asdict(it) for it in self.inbox],
            "consume": [asdict(it) for it in self.consume],
            "left_out": self.left_out,
        }

    def by_peer(self, scenario: str) -> dict[str, list[Drained]]:
        runs: defaultdict[str, list[Drained]] = defaultdict(list)
        for run in self.drains[scenario]:
            runs[run.peer].append(run)
        return dict(sorted(runs.items(), key=lambda pair: -median_rate(pair[1])))

    def show(self, console: Console) -> None:
        for scenario in self.drains:
            console.print(self._drain_table(scenario))
        for name in ("latency", "start", "crash", "huge", "idle", "emit", "inbox", "consume"):
            if rows := getattr(self, name):
                console.print(_plain_table(name, [asdict(row) for row in rows]))
        if self.growth:
            console.print(self._growth_table())
        for peer, why in self.left_out.items():
            console.print(f"[yellow]left out: {peer}: {why}[/]")

    def _drain_table(self, scenario: str) -> Table:
        table = Table(
            title=f"{scenario}: {self.drains[scenario][0].events:,} events",
            caption="medians (low-high); CPU µs per event of relay, walsender (ws), broker; MB: peak RSS",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=0,
            collapse_padding=True,
        )
        for head in ("", "events/s", "ours÷", "relay", "ws", "broker", "r÷ws", "MB", "dup"):
            table.add_column(head, justify="left" if not head else "right", no_wrap=True)
        by_peer = self.by_peer(scenario)
        ours = median_rate(by_peer[US]) if US in by_peer else None
        for peer, runs in by_peer.items():
            rates = [run.events_per_second / 1000 for run in runs]
            median = statistics.median(rates)
            table.add_row(
                f"[bold]{peer}[/]" if peer == US else peer,
                f"{median:,.0f}k ({min(rates):,.0f}-{max(rates):,.0f})",
                f"{ours / 1000 / median:.2f}" if ours else "",
                *(_median_text(runs, name, 1) for name in ("relay_us", "walsender_us", "broker_us")),
                _median_text(runs, "relay_per_walsender", 2),
                _median_text(runs, "peak_rss_mb", 0),
                f"{max(run.duplicates for run in runs):,}",
            )
        return table

    def _growth_table(self) -> Table:
        table = Table(title="growth: cost per event, ours")
        for head in ("", "value", "events", "events/s", "relay µs", "walsender µs"):
            table.add_column(head, justify="left" if not head else "right")
        for it in self.growth:
            run = it.drained
            table.add_row(
                it.what,
                f"{it.value:,}",
                f"{run.events:,}",
                f"{run.events_per_second:,.0f}",
                f"{run.relay_us:.2f}",
                f"{run.walsender_us or 0:.2f}",
            )
        return table


def median_rate(runs: Sequence[Drained]) -> float:
    return statistics.median(run.events_per_second for run in runs)


def _median_text(runs: Sequence[Drained], name: str, digits: int) -> str:
    values = [value for run in runs if (value := getattr(run, name)) is not None]
    return f"{statistics.median(values):,.{digits}f}" if values else ""


def _plain_text(value: object) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _plain_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*map(_plain_text, row.values()))
    return table
