"""What a forgotten transaction costs: claim and settle while an old snapshot keeps vacuum from removing anything.

    python -m benchmarks.held_snapshot [--runs 1] [--events 3000] [--seconds 600] [--batch 100]

A writer commits `--events` a second, another connection holds a REPEATABLE READ snapshot for all of ten minutes, and
one carrier of a relay, with its pinned plans and its housekeeping, takes a batch whenever one is full. The last
window's time, as a ratio to the first's, shows decay; the same without the snapshot is the control. Full looks past the
floors, one a minute, are among the steps.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from uuid import uuid4

import asyncpg
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.ground import Nothing, Row, fill, outbox_database, percentile
from outbox import Registration, RetryPolicy, SyncConfig, SyncManager
from outbox.carrier import Carrier
from outbox.housekeeping import Housekeeper
from outbox.primary import Primary
from outbox.testing.postgres import EmbeddedPostgres

SECONDS = 600
# At full scale a minute each.
WINDOWS = 10
GOAL = 1.5
_TICK = 0.01


class Writer:
    """Commits a fixed number of events a second, whatever happens."""

    def __init__(self, connection: asyncpg.Connection, events: int) -> None:
        self.written = 0
        self._connection = connection
        self._events = events

    async def run(self) -> None:
        started = time.perf_counter()
        while True:
            owed = int((time.perf_counter() - started) * self._events) - self.written
            if owed > 0:
                await fill(self._connection, owed, start=self.written + 1)
                self.written += owed
            await asyncio.sleep(_TICK)


class Steps:
    """Every claim and settle of one carrier, timed, in windows."""

    def __init__(self, carrier: Carrier, housekeeper: Housekeeper, config: SyncConfig) -> None:
        self.windows: list[list[float]] = []
        self.carried = 0
        self.tidying: list[float] = []
        self._carrier = carrier
        self._housekeeper = housekeeper
        self._config = config

    async def run(self, writer: Writer, seconds: float) -> None:
        started = time.perf_counter()
        tidy_at = started
        while (now := time.perf_counter()) < started + seconds:
            window = int((now - started) / seconds * WINDOWS)
            if now >= tidy_at:
                await self._tidy()
                tidy_at = now + self._config.prune_interval.total_seconds()
            elif writer.written - self.carried >= self._config.batch_size:
                await self._step(window)
            else:
                await asyncio.sleep(_TICK / 10)

    async def _step(self, window: int) -> None:
        started = time.perf_counter()
        self.carried += await self._carrier.run_once()
        while len(self.windows) <= window:
            self.windows.append([])
        self.windows[window].append((time.perf_counter() - started) * 1000)

    async def _tidy(self) -> None:
        started = time.perf_counter()
        await self._housekeeper.tidy()
        self.tidying.append((time.perf_counter() - started) * 1000)


@asynccontextmanager
async def steps_of(url: str, config: SyncConfig) -> AsyncIterator[Steps]:
    """A carrier and a housekeeper as a relay makes them."""
    engine = create_async_engine(url)
    registration = Registration(Nothing())
    await SyncManager(engine, [registration]).register()
    primary = Primary(engine, config)
    await primary.open()
    carrier = Carrier(registration, primary, config, RetryPolicy.from_config(config), uuid4())
    yield Steps(carrier, Housekeeper(primary, config, [registration.backend_id]), config)
    await primary.close()
    await engine.dispose()


async def decay(server: EmbeddedPostgres, events: int, seconds: float, batch: int, *, held: bool) -> tuple[Steps, int]:
    """Run once; return the times, and how many events were left behind."""
    config = SyncConfig(batch_size=batch, doorbell=False)
    async with AsyncExitStack() as opened:
        name = await opened.enter_async_context(outbox_database(server))
        steps = await opened.enter_async_context(steps_of(server.dsn(name), config))
        connections = [await asyncpg.connect(server.dsn(name, driver="postgresql")) for _ in range(2)]
        for connection in connections:
            opened.push_async_callback(connection.close)
        if held:
            await connections[0].execute("begin isolation level repeatable read; select count(*) from outbox")
        writer = Writer(connections[1], events)
        writing = asyncio.create_task(writer.run())
        await steps.run(writer, seconds)
        writing.cancel()
        await asyncio.wait([writing])
        return steps, writer.written - steps.carried


def describe(steps: Steps, behind: int, *, held: bool) -> str:
    medians = " ".join(f"{statistics.median(window):.2f}" for window in steps.windows)
    slowest = " ".join(f"{percentile(window, 99):.2f}" for window in steps.windows)
    title = "  snapshot held" if held else "  control      "
    return (
        f"{title} median ms {medians}; p99 ms {slowest}; housekeeping at most {max(steps.tidying):.1f} ms; "
        f"{steps.carried:,} carried, {behind:,} behind"
    )


async def rows(
    server: EmbeddedPostgres,
    runs: int,
    scale: float = 1.0,
    events: int = 3_000,
    seconds: float = SECONDS,
    batch: int = 100,
) -> AsyncIterator[Row]:
    """Yield how much slower the last window is than the first, with the snapshot held and without."""
    for held in (True, False):
        medians, slowest = [], []
        for _ in range(runs):
            steps, behind = await decay(server, events, max(10.0, seconds * scale), batch, held=held)
            print(describe(steps, behind, held=held), flush=True)
            first, last = steps.windows[0], steps.windows[-1]
            medians.append(statistics.median(last) / statistics.median(first))
            slowest.append(percentile(last, 99) / percentile(first, 99))
        what = "with an old snapshot" if held else "without one"
        yield Row(f"claim and settle {what}, p99 of the last minute / first", slowest, most=GOAL if held else None)
        yield Row("  median of the last minute / first", medians)


async def measure(server: EmbeddedPostgres, runs: int, events: int, seconds: float, batch: int) -> None:
    async for row in rows(server, runs, events=events, seconds=seconds, batch=batch):
        print(row, flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=1)
    arguments.add_argument("--events", type=int, default=3_000)
    arguments.add_argument("--seconds", type=float, default=SECONDS)
    arguments.add_argument("--batch", type=int, default=100)
    given = arguments.parse_args()
    with EmbeddedPostgres() as server:
        asyncio.run(measure(server, given.runs, given.events, given.seconds, given.batch))


if __name__ == "__main__":
    main()
