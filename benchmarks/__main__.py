"""All benchmarks, one table: every goal, what was measured, and whether that is enough.

    python -m benchmarks [--runs 5] [--only NAME ...] [--scale 1.0] [--results DIRECTORY]

Ratios are taken pair by pair within one run, because a shared machine drifts; the noise lines, before and after, say
how much. At full scale what was measured is kept in benchmarks/results by commit. `--scale 0.05` is for seeing it work,
not for figures, and is kept only where `--results` says.
"""

from __future__ import annotations

import argparse
import asyncio
import traceback
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from benchmarks import (
    backfill,
    compressed_day,
    dead_secondary,
    deep_backlog,
    doorbell_cost,
    event_cost,
    fairness,
    growth,
    held_snapshot,
    idle_relay,
    idle_writer,
    latency,
    latency_by_rate,
    memory,
    peer_comparison,
    poisoned_key,
    real_secondaries,
    reconcile,
    relay_throughput,
    waiters,
    writer_overhead,
)
from benchmarks.ground import Row
from benchmarks.results import RESULTS, Part, commit, keep, line, machine, noise, now
from outbox.testing.postgres import EmbeddedPostgres

# A run of many minutes is not repeated five times.
LONG_RUNS = 1

Rows = Callable[[EmbeddedPostgres, int, float], AsyncIterator[Row]]
BENCHMARKS: dict[str, tuple[Rows, int | None]] = {
    "relay_throughput": (relay_throughput.rows, None),
    "peers": (peer_comparison.rows, None),
    "writer_overhead": (writer_overhead.rows, None),
    "doorbell_cost": (doorbell_cost.rows, None),
    "real_secondaries": (real_secondaries.rows, None),
    "growth": (growth.rows, None),
    "event_cost": (event_cost.rows, None),
    "poisoned_key": (poisoned_key.rows, None),
    "idle_writer": (idle_writer.rows, None),
    "idle_relay": (idle_relay.rows, None),
    "latency": (latency.rows, None),
    "latency_by_rate": (latency_by_rate.rows, None),
    "waiters": (waiters.rows, None),
    "fairness": (fairness.rows, None),
    "dead_secondary": (dead_secondary.rows, None),
    "memory": (memory.rows, None),
    "backfill": (backfill.rows, LONG_RUNS),
    "reconcile": (reconcile.rows, None),
    "deep_backlog": (deep_backlog.rows, None),
    "compressed_day": (compressed_day.rows, LONG_RUNS),
    "held_snapshot": (held_snapshot.rows, LONG_RUNS),
}


async def measure(name: str, runs: int, scale: float) -> list[Row]:
    """Run one benchmark, and print its rows as they come."""
    rows, found = BENCHMARKS[name][0], []
    # A server of its own, so that nobody's WAL and dead rows are another's noise.
    with EmbeddedPostgres() as server:
        async for row in rows(server, runs, scale):
            print(row, flush=True)
            found.append(row)
    return found


def measured(name: str, runs: int, scale: float, results: Path | None) -> list[Row]:
    """Run one benchmark and keep what it found; one that fails is a row that says so, and the others go on."""
    _, most_runs = BENCHMARKS[name]
    runs = runs if most_runs is None else min(runs, most_runs)
    before = noise()
    print(f"\n{name}, {runs} runs; {before}", flush=True)
    try:
        found = asyncio.run(measure(name, runs, scale))
    except Exception as error:  # noqa: BLE001 - hours of the others must not be lost with it
        traceback.print_exc()
        return [Row(f"{name} failed: {type(error).__name__}", [], least=1)]
    if results is not None:
        keep(results, name, Part(now(), runs, scale, (before, noise()), [line(row) for row in found]))
    return found


def arguments() -> argparse.Namespace:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--runs", type=int, default=5)
    found.add_argument("--only", choices=BENCHMARKS, nargs="+", default=list(BENCHMARKS))
    found.add_argument("--scale", type=float, default=1.0)
    found.add_argument("--results", type=Path)
    return found.parse_args()


def main() -> int:
    given = arguments()
    results = given.results or (RESULTS if given.scale == 1 else None)
    print(f"commit {commit()}, {machine()}, {now()}")
    found = {name: measured(name, given.runs, given.scale, results) for name in given.only}
    print(f"\n{'':<80} {'goal':>8} {'median':>10}  (min to max)")
    for name, rows in found.items():
        print(f"\n{name}")
        for row in rows:
            print(row)
    goals = [row.verdict for rows in found.values() for row in rows if row.goal != "-"]
    print(f"\n{goals.count('pass')} of {len(goals)} goals reached; {noise()}")
    return int("missing" in goals)


if __name__ == "__main__":
    raise SystemExit(main())
