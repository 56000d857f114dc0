"""Charts of a report, PNG and SVG, for a README: what one would rather look at than read."""

import statistics
from pathlib import Path
from typing import Any, Final

from benchmarks.report import US, Report

_OURS: Final = "#1f77b4"
_OTHERS: Final = "#b0b7bf"
_WALSENDER: Final = "#e39b3b"


def draw(report: Report, folder: Path) -> list[Path]:
    """One chart a kind of scenario; returns the files."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "cdc"})
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    for scenario in report.drains:
        made += _save(plt, _draw_rates(plt, report, scenario), folder / f"{scenario}-rate")
        made += _save(plt, _draw_costs(plt, report, scenario), folder / f"{scenario}-cost")
    if report.growth:
        made += _save(plt, _draw_growth(plt, report), folder / "growth")
    return made


def _draw_rates(plt: Any, report: Report, scenario: str) -> Any:
    by_peer = report.by_peer(scenario)
    figure, axes = plt.subplots(figsize=(7, 0.55 * len(by_peer) + 1.2))
    peers = list(reversed(by_peer))
    rates = [[run.events_per_second for run in by_peer[peer]] for peer in peers]
    medians = [statistics.median(these) for these in rates]
    lows = [median - min(these) for these, median in zip(rates, medians, strict=True)]
    highs = [max(these) - median for these, median in zip(rates, medians, strict=True)]
    colors = [_OURS if peer == US else _OTHERS for peer in peers]
    axes.barh(peers, medians, xerr=[lows, highs], color=colors, error_kw={"ecolor": "#555", "lw": 1})
    for place, (median, high) in enumerate(zip(medians, highs, strict=True)):
        axes.text(median + high, place, f"  {median:,.0f}", va="center")
    axes.set_xlim(0, max(map(sum, zip(medians, highs, strict=True))) * 1.18)
    axes.set_xlabel("events per second (median; bars: lowest and highest run)")
    axes.set_title(f"{scenario}: {report.drains[scenario][0].events:,} events", loc="left")
    return figure


def _draw_costs(plt: Any, report: Report, scenario: str) -> Any:
    by_peer = {peer: runs for peer, runs in report.by_peer(scenario).items() if runs[0].relay_us}
    figure, axes = plt.subplots(figsize=(7, 0.55 * len(by_peer) + 1.2))
    peers = list(reversed(by_peer))
    relay = [statistics.median(run.relay_us for run in by_peer[peer]) for peer in peers]
    walsender = [statistics.median(run.walsender_us or 0 for run in by_peer[peer]) for peer in peers]
    axes.barh(peers, relay, color=[_OURS if peer == US else _OTHERS for peer in peers], label="the relay")
    axes.barh(peers, walsender, left=relay, color=_WALSENDER, label="PostgreSQL's walsender")
    axes.set_xlabel("CPU microseconds per event")
    axes.set_title(f"{scenario}: what an event costs", loc="left")
    axes.legend(frameon=False, loc="lower right")
    return figure


def _draw_growth(plt: Any, report: Report) -> Any:
    kinds = list(dict.fromkeys(it.what for it in report.growth))
    figure, places = plt.subplots(1, len(kinds), figsize=(3.2 * len(kinds), 2.8), squeeze=False)
    for axes, what in zip(places[0], kinds, strict=True):
        points = [it for it in report.growth if it.what == what]
        axes.plot([it.value for it in points], [it.drained.relay_us for it in points], "o-", color=_OURS)
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(what)
    places[0][0].set_ylabel("relay CPU µs per event")
    return figure


def _save(plt: Any, figure: Any, path: Path) -> list[Path]:
    files = [path.with_suffix(f".{kind}") for kind in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=140, bbox_inches="tight", metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
    return files
