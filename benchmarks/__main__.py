"""All benchmarks, one table.

    python -m benchmarks [--runs 5] [--only NAME] [--scale 1.0]

Ratios are taken pair by pair within one run, because a shared machine drifts; the noise lines, before and after, say
how much. `--scale 0.05` is for seeing it work, not for figures.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime

from benchmarks import (
    backfill,
    fairness,
    held_snapshot,
    latency,
    memory,
    reconcile,
    relay_throughput,
    waiters,
    writer_overhead,
)
from benchmarks.ground import Row
from outbox.testing.postgres import EmbeddedPostgres

# A run of minutes that only informs is not repeated; its own main repeats it when asked.
LONG_RUNS = 1

Rows = Callable[[EmbeddedPostgres, int, float], AsyncIterator[Row]]
BENCHMARKS: dict[str, tuple[Rows, int | None]] = {
    "relay_throughput": (relay_throughput.rows, None),
    "writer_overhead": (writer_overhead.rows, None),
    "latency": (latency.rows, None),
    "waiters": (waiters.rows, None),
    "fairness": (fairness.rows, None),
    "memory": (memory.rows, None),
    "backfill": (backfill.rows, LONG_RUNS),
    "reconcile": (reconcile.rows, None),
    "held_snapshot": (held_snapshot.rows, LONG_RUNS),
}


def noise() -> str:
    """What this machine is like now: a disk's promise and a fixed piece of work."""
    loads = "/".join(f"{load:.1f}" for load in os.getloadavg())
    cpu = [_fixed_work() for _ in range(5)]
    return (
        f"machine: fdatasync p50 {_fdatasync():.2f} ms, fixed CPU loop {statistics.median(cpu):.0f} ms "
        f"({min(cpu):.0f} to {max(cpu):.0f}), load {loads}, {os.cpu_count()} CPUs, {datetime.now(UTC):%Y-%m-%d %H:%M}Z"
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


async def measure(chosen: list[str], runs: int, scale: float) -> list[Row]:
    found = []
    for name in chosen:
        rows, most_runs = BENCHMARKS[name]
        # A server of its own, so that nobody's WAL and dead rows are another's noise.
        with EmbeddedPostgres() as server:
            async for row in rows(server, runs if most_runs is None else min(runs, most_runs), scale):
                print(row, flush=True)
                found.append(row)
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--only", choices=BENCHMARKS)
    arguments.add_argument("--scale", type=float, default=1.0)
    given = arguments.parse_args()
    print(noise())
    found = asyncio.run(measure([given.only] if given.only else list(BENCHMARKS), given.runs, given.scale))
    print(f"\n{'benchmark':<64} {'goal':>8} {'median':>10}  (min to max)")
    for row in found:
        print(row)
    print(noise())


if __name__ == "__main__":
    main()
