"""What a relay takes of a CPU when there is nothing to do.

    python -m benchmarks --only idle_relay [--runs 5] [--scale 1.0]

A process of its own with default settings and one or sixteen secondaries, after it has come to rest.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator

from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.ground import Nothing, Row, outbox_database
from outbox import SyncManager
from outbox.testing.postgres import EmbeddedPostgres

SECONDS = 30.0
# By then it is at its longest sleep.
REST = 3.0
GOAL = 1.0


async def relay(url: str, secondaries: int, seconds: float) -> float:
    """The child: the percentage of one CPU that a relay with nothing to do takes."""
    engine = create_async_engine(url)
    manager = SyncManager(engine, [Nothing(f"secondary-{number}") for number in range(secondaries)])
    await manager.register()
    idle = manager.relay()
    running = asyncio.create_task(idle.run())
    await asyncio.sleep(REST)
    started, cpu = time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    share = (time.process_time() - cpu) / (time.monotonic() - started) * 100
    idle.stop()
    await running
    await engine.dispose()
    return share


async def share(url: str, secondaries: int, seconds: float) -> float:
    """Run the child."""
    command = [sys.executable, "-m", "benchmarks.idle_relay", url, str(secondaries), str(seconds)]
    child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    said, _ = await child.communicate()
    assert child.returncode == 0, "the relay's process failed"
    return float(said)


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0) -> AsyncIterator[Row]:
    """Yield the share of a CPU with one secondary and with sixteen."""
    for secondaries, most in ((1, GOAL), (16, None)):
        async with outbox_database(server) as name:
            seconds = max(3.0, SECONDS * scale)
            shares = [await share(server.dsn(name), secondaries, seconds) for _ in range(runs)]
            what = "one secondary" if secondaries == 1 else f"{secondaries} secondaries"
            yield Row(f"CPU of an idle relay, {what}, % of a core", shares, most=most)


if __name__ == "__main__":
    print(asyncio.run(relay(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))))
