"""What benchmarks found is kept by commit, judged against its goals, and told on the page as it was kept."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.ground import Row
from benchmarks.report import BEGIN, END, PAGE, figures, written
from benchmarks.results import RESULTS, Line, Part, Results, commit, keep, latest, line, load, told

ROOT = Path(__file__).parent.parent


def part(*rows: Row, at: str = "2026-01-02 03:04Z", scale: float = 1) -> Part:
    return Part(at, 5, scale, ("quiet", "quiet"), [line(row) for row in rows])


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (Row("at the goal", [0.5, 0.6, 0.7], least=0.6), "pass"),
        (Row("below it", [0.5, 0.59, 0.7], least=0.6), "short"),
        (Row("at the bound", [1, 300, 900], most=300), "pass"),
        (Row("above it", [1, 301, 900], most=300), "short"),
        (Row("none may be", [0, 0, 0.1], most=0), "pass"),
        (Row("one too many", [0, 0.1, 0.1], most=0), "short"),
        (Row("not measured", [], least=0.6), "missing"),
        (Row("no goal", [1]), ""),
        (Row("no goal, not measured", []), ""),
    ],
    ids=lambda given: given.name if isinstance(given, Row) else None,
)
def test_a_row_is_judged_by_its_median(row: Row, verdict: str) -> None:
    assert row.verdict == verdict
    assert str(row).rstrip().endswith(verdict)


@pytest.fixture
def at_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "commit", lambda: "abc123")


@pytest.mark.usefixtures("at_commit")
def test_parts_of_a_commit_are_merged_and_measured_again_they_are_replaced(tmp_path: Path) -> None:
    keep(tmp_path, "one", part(Row("first", [1.23456], most=2, curve="pending:x", x=5)))
    keep(tmp_path, "two", part(Row("second", [7])))
    path = keep(tmp_path, "one", part(Row("third", [3])))
    found = load(path)
    assert path == tmp_path / "abc123.json"
    assert {name: [each.name for each in kept.rows] for name, kept in found.parts.items()} == {
        "one": ["third"],
        "two": ["second"],
    }


@pytest.mark.usefixtures("at_commit")
def test_a_row_is_kept_with_its_goal_verdict_and_point(tmp_path: Path) -> None:
    path = keep(tmp_path, "one", part(Row("first", [1.23456, 1, 1.5], most=2, curve="pending:x", x=5)))
    [kept] = load(path).parts["one"].rows
    assert kept == Line("first", [1.235, 1, 1.5], "<= 2", "pass", "pending:x", 5)
    assert kept.median == 1.235


def test_each_part_is_told_as_it_was_measured_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, at in (("newer", "2026-01-03 00:00Z"), ("older", "2026-01-02 00:00Z")):
        monkeypatch.setattr(results, "commit", lambda name=name: name)
        keep(tmp_path, "one", part(at=at))
        keep(tmp_path, f"only {name}", part(at=at))
    assert {name: each.commit for name, each in latest(tmp_path).items()} == {
        "only older": "older",
        "one": "newer",
        "only newer": "newer",
    }
    with pytest.raises(FileNotFoundError):
        latest(tmp_path / "nothing")


def test_a_commit_is_named_and_its_changes_told() -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    name, _, changed = commit().partition("-")
    assert head.startswith(name)
    assert len(name) == 12
    assert changed in ("", "changed")


MEASURED = told(
    Results(
        "abc123",
        "a machine",
        {
            "growth": part(Row("fast enough", [1, 2, 3], least=2), Row("too slow", [0.51, 0.5, 0.49], least=0.6)),
            "peers": part(
                Row("ours: relay, deliveries/s", [30_000, 31_000]),
                Row("theirs 1.0: relay, deliveries/s", [10_000]),
                Row("gone: not measured: no such package", []),
                Row("ours / best peer: relay", [3.1], least=3),
            ),
            "trial": part(Row("not measured", [], most=1), scale=0.1),
        },
    )
)


def test_the_tables_tell_every_goal_and_every_system() -> None:
    told = figures(MEASURED)
    for expected in (
        "2 of 4 goals reached. On a machine.",
        "| **growth**, 5 runs, 2026-01-02, `abc123` | | | | |",
        "| fast enough | at least 2 | 2 | 1 to 3 | pass |",
        "| too slow | at least 0.6 | 0.5 | 0.49 to 0.51 | short |",
        "| **trial**, 5 runs at scale 0.1: not figures, only a trial, 2026-01-02, `abc123` | | | | |",
        "| not measured | at most 1 |  |  | missing |",
        "| system | relay, deliveries/s |",
        "| ours | 30,500 |",
        "| theirs 1.0 | 10,000 |",
        "| gone, not measured: no such package |  |",
    ):
        assert expected in told.splitlines()


def test_only_what_is_between_the_marks_is_replaced() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    new = written(page, MEASURED)
    assert new == f"before\n{BEGIN}\n{figures(MEASURED)}\n{END}\nafter\n"
    assert written(new, MEASURED) == new
    for broken in (page.replace(BEGIN, ""), page.replace(END, "")):
        with pytest.raises(ValueError, match="no place"):
            written(broken, MEASURED)


def test_the_page_is_what_the_latest_results_say() -> None:
    page = PAGE.read_text()
    pictures = [PAGE.parent / name for name in re.findall(r"!\[.+\]\((.+\.png)\)", page)]
    if any(RESULTS.glob("*.json")):
        assert page == written(page, latest(), pictures)
        assert all(picture.exists() for picture in pictures)
    else:
        assert "Nothing measured yet" in page
