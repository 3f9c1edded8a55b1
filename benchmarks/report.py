"""The figures of `docs/performance.md`, made anew from results, and the pictures beside it.

    python -m benchmarks.report [RESULTS.json] [--page docs/performance.md]

Only what stands between the marks of the page is replaced; without a file, the results measured last are taken.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.results import ROOT, Line, Part, Results, latest, load

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
PEERS = "peers"


def figures(results: Results) -> str:
    """Return all tables: the goals, part by part, then all systems side by side."""
    lines = [f"Commit `{results.commit}`; {results.machine}.", "", *_goals(results)]
    if PEERS in results.parts:
        lines += ["", *_systems(results.parts[PEERS])]
    return "\n".join(lines)


def written(page: str, results: Results, pictures: Sequence[Path] = ()) -> str:
    """Return the page with these figures and pictures. Raises `ValueError` where its marks are missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the page has no place for figures")
    shown = "".join(f"\n![{each.stem.replace('-', ' ')}]({each.name})\n" for each in pictures)
    return f"{before}{BEGIN}\n{figures(results)}\n{shown}{END}{after}"


def _goals(results: Results) -> Iterator[str]:
    goals = [line.verdict for part in results.parts.values() for line in part.rows if line.goal != "-"]
    yield f"{goals.count('pass')} of {len(goals)} goals reached."
    yield ""
    yield "| what | goal | median | min to max | |"
    yield "| :-- | --: | --: | --: | :-- |"
    for name, part in results.parts.items():
        rows = [line for line in part.rows if line.goal != "-"]
        if rows:
            yield f"| **{name.replace('_', ' ')}**, {_how(part)} | | | | |"
        yield from map(_row, rows)


def _how(part: Part) -> str:
    runs = "1 run" if part.runs == 1 else f"{part.runs} runs"
    return runs if part.scale == 1 else f"{runs} at scale {part.scale:g}: not figures, only a trial"


def _row(line: Line) -> str:
    goal = line.goal.replace(">=", "at least").replace("<=", "at most")
    return f"| {line.name.strip()} | {goal} | {_number(line.median)} | {_spread(line)} | {line.verdict} |"


def _spread(line: Line) -> str:
    return f"{_number(min(line.values))} to {_number(max(line.values))}" if line.values else ""


def _systems(part: Part) -> Iterator[str]:
    """Every row named `system: what` is a cell; what is not a figure of a system is said elsewhere."""
    cells = [(*line.name.split(": ", 1), line) for line in part.rows if "/ best" not in line.name and ": " in line.name]
    columns = list(dict.fromkeys(what for _, what, line in cells if line.values))
    yield f"All systems side by side, medians of {_how(part)}:"
    yield ""
    yield "| system | " + " | ".join(columns) + " |"
    yield "| :-- |" + " --: |" * len(columns)
    for system in dict.fromkeys(system for system, _, _ in cells):
        own = {what: line for found, what, line in cells if found == system}
        missing = next((what for what, line in own.items() if not line.values), "")
        values = [_number(own[what].median) if what in own else "" for what in columns]
        yield f"| {system}{', ' + missing if missing else ''} | " + " | ".join(values) + " |"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("results", type=Path, nargs="?")
    arguments.add_argument("--page", type=Path, default=PAGE)
    given = arguments.parse_args()
    results = load(given.results or latest())
    from benchmarks.plots import drawn  # noqa: PLC0415 - the tables alone need no matplotlib

    pictures = drawn(results, given.page.parent)
    given.page.write_text(written(given.page.read_text(), results, pictures))
    print(f"{given.page.name} and {', '.join(path.name for path in pictures)} from {results.commit}")


if __name__ == "__main__":
    main()
