"""The figures of `docs/performance.md`, made anew from results, and the pictures beside it.

    python -m benchmarks.report [RESULTS.json] [--page docs/performance.md]

Only what stands between the marks of the page is replaced; without a file, each part is told as it was measured last.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.results import ROOT, Line, Measured, Part, latest, load, told

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
PEERS = "peers"


def figures(results: Mapping[str, Measured]) -> str:
    """Return all tables: the goals, part by part, then all systems side by side."""
    lines = [*_goals(results)]
    if PEERS in results:
        lines += ["", *_systems(results[PEERS].part)]
    return "\n".join(lines)


def written(page: str, results: Mapping[str, Measured], pictures: Sequence[Path] = ()) -> str:
    """Return the page with these figures and pictures. Raises `ValueError` where its marks are missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the page has no place for figures")
    shown = "".join(f"\n![{each.stem.replace('-', ' ')}]({each.name})\n" for each in pictures)
    return f"{before}{BEGIN}\n{figures(results)}\n{shown}{END}{after}"


def _goals(results: Mapping[str, Measured]) -> Iterator[str]:
    goals = [line.verdict for each in results.values() for line in each.part.rows if line.goal != "-"]
    machines = "; ".join(sorted({each.machine for each in results.values()}))
    yield f"{goals.count('pass')} of {len(goals)} goals reached. On {machines}."
    yield ""
    yield "| what | goal | median | min to max | |"
    yield "| :-- | --: | --: | --: | :-- |"
    for name, (commit, _, part) in results.items():
        rows = [line for line in part.rows if line.goal != "-"]
        if rows:
            yield f"| **{name.replace('_', ' ')}**, {_how(part)}, {part.at.partition(' ')[0]}, `{commit}` | | | | |"
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
    results = told(load(given.results)) if given.results else latest()
    from benchmarks.plots import drawn  # noqa: PLC0415 - the tables alone need no matplotlib

    pictures = drawn(results, given.page.parent)
    given.page.write_text(written(given.page.read_text(), results, pictures))
    print(given.page.name, *(path.name for path in pictures))


if __name__ == "__main__":
    main()
