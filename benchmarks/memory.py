"""Resident memory of a relay process in front of a deep backlog: it must not grow with what is owed.

    python -m benchmarks.memory [--runs 1] [--events 1000000] [--seconds 15]

A child process drains, with default settings and events of 500 bytes, while its resident memory is sampled from
outside. The peak is the kernel's own mark where it keeps one.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.ground import Nothing, Row, fill, outbox_database
from outbox import SyncConfig, SyncManager
from outbox.testing.postgres import EmbeddedPostgres

GOAL_MB = 200
_SAMPLE = 0.1
_MARK = re.compile(r"^(VmHWM|VmRSS):\s+(\d+) kB", re.MULTILINE)


async def relay(url: str, seconds: float) -> int:
    """The child: drain for a while, then say how many events that was."""
    engine = create_async_engine(url)
    secondary = Nothing()
    running = SyncManager(engine, [secondary], config=SyncConfig(doorbell=False)).relay()
    asyncio.get_running_loop().call_later(seconds, running.stop)
    await running.run()
    await engine.dispose()
    return secondary.seen


async def top_up(dsn: str, events: int) -> None:
    """Have so many events owed, whatever the last run left of them."""
    connection = await asyncpg.connect(dsn)
    owed = await connection.fetchval("select count(*) from outbox_delivery")
    # Past every key there was, so that nothing is superseded.
    start = 1 + await connection.fetchval("select coalesce(max(event_id), 0) from outbox")
    await fill(connection, events - owed, start=start)
    await connection.execute("vacuum analyze outbox, outbox_delivery")
    await connection.close()


def peak(url: str, seconds: float) -> tuple[float, float, int]:
    """Run the child; return its peak and its median memory in MB, and how many events it carried."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", url, "--seconds", str(seconds)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    samples: list[float] = []
    highest = 0.0
    while child.poll() is None:
        marks = _marks(child.pid)
        samples.append(marks.get("VmRSS", 0.0))
        highest = max(highest, marks.get("VmHWM", 0.0), samples[-1])
        time.sleep(_SAMPLE)
    carried, _ = child.communicate()
    assert child.returncode == 0, "the relay's process failed"
    return highest, sorted(samples)[len(samples) // 2], int(carried)


def _marks(pid: int) -> dict[str, float]:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        asked = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return {"VmRSS": float(asked.stdout.strip() or 0) / 1024}
    return {name: float(kilobytes) / 1024 for name, kilobytes in _MARK.findall(status)}


async def rows(
    server: EmbeddedPostgres, runs: int, scale: float = 1.0, events: int = 1_000_000, seconds: float = 15
) -> AsyncIterator[Row]:
    """Yield the peak for a deep backlog, and for a hundredth of it: they should not differ."""
    events = max(1_000, int(events * scale))
    async with outbox_database(server) as name:
        engine = create_async_engine(server.dsn(name))
        await SyncManager(engine, [Nothing()]).register()
        await engine.dispose()
        for backlog, most in ((events // 100, None), (events, GOAL_MB)):
            peaks, carried = [], 0
            for _ in range(runs):
                await top_up(server.dsn(name, driver="postgresql"), backlog)
                highest, _, carried = await asyncio.to_thread(peak, server.dsn(name), seconds * min(1.0, scale * 10))
                peaks.append(highest)
            yield Row(f"relay's peak MB, {backlog:,} events owed ({carried:,} carried)", peaks, most=most)


async def measure(server: EmbeddedPostgres, runs: int, events: int, seconds: float) -> None:
    async for row in rows(server, runs, events=events, seconds=seconds):
        print(row, flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=1)
    arguments.add_argument("--events", type=int, default=1_000_000)
    arguments.add_argument("--seconds", type=float, default=15)
    arguments.add_argument("--child", metavar="URL", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        print(asyncio.run(relay(given.child, given.seconds)))
        return
    with EmbeddedPostgres() as server:
        asyncio.run(measure(server, given.runs, given.events, given.seconds))


if __name__ == "__main__":
    main()
