"""How rates grow, drawn from results: medians as lines, the spread between runs as a band.

    python -m benchmarks.plots [RESULTS.json] [--into docs]

Every axis of rates and times begins at zero, so that flat looks flat and half looks half.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.results import ROOT, Line, Measured, latest, load, told

mpl.use("Agg")


class Plot(NamedTuple):
    """A picture: which curves, and what its axes say."""

    file: str
    title: str
    across: str
    up: str


PLOTS = {
    "pending": Plot("growth-pending.png", "One relay before a backlog", "deliveries owed", "events per second"),
    "secondaries": Plot("growth-secondaries.png", "One relay for many", "secondaries", "deliveries per second"),
    "recording": Plot("growth-recording.png", "Writers for many", "secondaries", "transactions per second"),
    "relays": Plot("growth-relays.png", "Relays at one secondary", "relays", "events per second"),
    "payload": Plot("growth-payload.png", "One relay by size of content", "bytes of one content", "events per second"),
    "rate": Plot("latency-by-rate.png", "Commit to applied", "events per second", "milliseconds"),
}
_STEPS = ((1_000_000, "M"), (1_000, "k"))


def curves(results: Mapping[str, Measured], prefix: str) -> dict[str, list[Line]]:
    """Return the points of every curve of a plot, from left to right."""
    found = defaultdict(list)
    for each in results.values():
        for line in each.part.rows:
            if line.curve and line.values and line.curve.startswith(f"{prefix}:"):
                found[line.curve.partition(":")[2]].append(line)
    return {name: sorted(points, key=lambda point: point.x) for name, points in found.items()}


def draw(plot: Plot, found: dict[str, list[Line]], into: Path) -> Path:
    """Draw one picture."""
    figure = Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, points in found.items():
        across = [point.x for point in points]
        (drawn,) = axes.plot(across, [point.median or 0 for point in points], marker="o", markersize=4, label=name)
        low, high = ([edge(point.values) for point in points] for edge in (min, max))
        axes.fill_between(across, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
    _dress(axes, plot, sorted({point.x for points in found.values() for point in points}))
    path = into / plot.file
    figure.savefig(path, metadata={"Software": None})
    return path


def drawn(results: Mapping[str, Measured], into: Path) -> list[Path]:
    """Draw all pictures that the results have points for."""
    found = {prefix: curves(results, prefix) for prefix in PLOTS}
    return [draw(PLOTS[prefix], each, into) for prefix, each in found.items() if each]


def short(value: float, _position: object = None) -> str:
    """Return a number as people say it: 200, 1.05M, 20k."""
    for size, unit in _STEPS:
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _dress(axes: Axes, plot: Plot, across: list[float]) -> None:
    axes.set_title(plot.title, loc="left", fontsize=11)
    axes.set_xlabel(plot.across)
    axes.set_ylabel(plot.up)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(FixedLocator(across))
    axes.xaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(short))
    axes.grid(axis="y", linewidth=0.5, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("results", type=Path, nargs="?")
    arguments.add_argument("--into", type=Path, default=ROOT / "docs")
    given = arguments.parse_args()
    for path in drawn(told(load(given.results)) if given.results else latest(), given.into):
        print(path.name)


if __name__ == "__main__":
    main()
