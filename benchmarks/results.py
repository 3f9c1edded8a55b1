"""What was measured, kept by commit: one small JSON file each, into which a later part of the same commit is merged."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from benchmarks.ground import Row

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
# What a figure depends on; documents and the results themselves do not count as a change.
_MEASURED = ("outbox", "migrations", "benchmarks", "pyproject.toml", ":!benchmarks/results")


class Line(msgspec.Struct, omit_defaults=True):
    """A row as it is kept."""

    name: str
    values: list[float]
    goal: str = "-"
    verdict: str = ""
    curve: str | None = None
    x: float = 0

    @property
    def median(self) -> float | None:
        return statistics.median(self.values) if self.values else None


class Part(msgspec.Struct):
    """One benchmark: when, how often and how large, and how noisy the machine was before and after."""

    at: str
    runs: int
    scale: float
    noise: tuple[str, str]
    rows: list[Line]


class Results(msgspec.Struct):
    """All that was measured of one commit, on one machine."""

    commit: str
    machine: str
    parts: dict[str, Part] = {}


class Measured(NamedTuple):
    """A part of the results, and what it was measured of."""

    commit: str
    machine: str
    part: Part


def commit() -> str:
    """Return the commit that is measured, marked if something was changed since."""
    found = _git("rev-parse", "--short=12", "HEAD").strip()
    return found + ("-changed" if _git("status", "--porcelain", "--", *_MEASURED).strip() else "")


def machine() -> str:
    """Say what kind of machine this is, in one line."""
    return f"{os.cpu_count()} CPUs, {platform.machine()}, {platform.system()}, Python {platform.python_version()}"


def now() -> str:
    """Return the time, to the minute."""
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M}Z"


def keep(directory: Path, name: str, part: Part) -> Path:
    """Write a part into the file of its commit; what the same part said before is replaced."""
    path = directory / f"{commit()}.json"
    results = load(path) if path.exists() else Results(path.stem, machine())
    results.parts[name] = part
    directory.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))
    return path


def load(path: Path) -> Results:
    """Read one file of results."""
    return msgspec.json.decode(path.read_bytes(), type=Results)


def latest(directory: Path = RESULTS) -> dict[str, Measured]:
    """Return each part as it was measured last, of whatever commit: hours of one are not lost with a change elsewhere.

    Raises `FileNotFoundError`.
    """
    found = [measured for path in directory.glob("*.json") for measured in told(load(path)).items()]
    if not found:
        raise FileNotFoundError(f"no results in {directory}: run make bench")
    return dict(sorted(found, key=lambda each: each[1].part.at))


def told(results: Results) -> dict[str, Measured]:
    """Return the parts of one file."""
    return {name: Measured(results.commit, results.machine, part) for name, part in results.parts.items()}


def line(row: Row) -> Line:
    """Return a row as it is kept; four digits say more than the machine's noise allows."""
    values = [float(f"{value:.4g}") for value in row.values]
    return Line(row.name, values, row.goal, row.verdict, row.curve, row.x)


def noise() -> str:
    """What this machine is like now: a disk's promise and a fixed piece of work."""
    loads = "/".join(f"{load:.1f}" for load in os.getloadavg())
    cpu = [_fixed_work() for _ in range(5)]
    return (
        f"fdatasync p50 {_fdatasync():.2f} ms, fixed CPU loop {statistics.median(cpu):.0f} ms "
        f"({min(cpu):.0f} to {max(cpu):.0f}), load {loads}"
    )


def _fdatasync(times: int = 200) -> float:
    taken = []
    with tempfile.NamedTemporaryFile(prefix="outbox-bench-") as file:
        for _ in range(times):
            os.pwrite(file.fileno(), os.urandom(8192), 0)
            started = time.perf_counter()
            getattr(os, "fdatasync", os.fsync)(file.fileno())
            taken.append((time.perf_counter() - started) * 1000)
    return statistics.median(taken)


def _fixed_work() -> float:
    started = time.perf_counter()
    total = 0
    for number in range(1_000_000):
        total += number & 7
    return (time.perf_counter() - started) * 1000


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
