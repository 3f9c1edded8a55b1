"""A day's events pushed through with prune on: tables and indexes must level off.

    python -m benchmarks --only compressed_day [--scale 1.0]

864,000 events, ten per second of a day, go through in minutes: `keep_events` and the other times are shortened as much
as the day is, and so is autovacuum's round. What is on disk is read once per hour of that day.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import asyncpg
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.ground import Nothing, Row, outbox_database
from benchmarks.held_snapshot import Writer
from outbox import SyncConfig, SyncManager
from outbox.testing.postgres import EmbeddedPostgres

EVENTS = 864_000
RATE = 2_000
HOURS = 24
GOAL = 1.1
SIZE = """
select sum(pg_total_relation_size(oid)) / 1e6 from pg_class
where relname in ('outbox', 'outbox_delivery', 'outbox_attempt', 'outbox_hold')
"""
# What runs every minute of a day cannot run that much more often; a second is what is possible.
SERVER = "alter system set autovacuum_naptime = '1s'"


def settings(hour: float) -> SyncConfig:
    """Return the default settings, an hour being so many seconds; attempts are kept as long as events."""
    kept = timedelta(seconds=hour)
    tidying = max(timedelta(milliseconds=200), kept / 60)
    return SyncConfig(doorbell=False, keep_events=kept, keep_attempts=kept, prune_interval=tidying)


@asynccontextmanager
async def relaying(url: str, config: SyncConfig) -> AsyncIterator[Nothing]:
    """Run a relay beside the block."""
    engine, secondary = create_async_engine(url), Nothing()
    manager = SyncManager(engine, [secondary], config=config)
    await manager.register()
    relay = manager.relay()
    running = asyncio.create_task(relay.run())
    yield secondary
    relay.stop()
    await running
    await engine.dispose()


async def sizes(server: EmbeddedPostgres, database: str, hour: float) -> tuple[list[float], int]:
    """Push the day through; return MB on disk at the end of each hour, and how many events were left behind."""
    dsn = server.dsn(database, driver="postgresql")
    writing, looking = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    await looking.execute(SERVER)
    await looking.execute("select pg_reload_conf()")
    found: list[float] = []
    async with relaying(server.dsn(database), settings(hour)) as secondary:
        writer = Writer(writing, RATE)
        task, started = asyncio.create_task(writer.run()), time.monotonic()
        for number in range(1, HOURS + 1):
            await asyncio.sleep(max(0.0, started + number * hour - time.monotonic()))
            found.append(float(await looking.fetchval(SIZE)))
        task.cancel()
        await asyncio.wait([task])
        behind = writer.written - secondary.seen
    await writing.close()
    await looking.close()
    return found, behind


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0) -> AsyncIterator[Row]:
    """Yield the size of the last quarter of the day as a ratio to that of the second, and in MB."""
    hour = max(1.0, EVENTS * scale / RATE / HOURS)
    measured, left = [], []
    for _ in range(runs):
        async with outbox_database(server) as name:
            found, behind = await sizes(server, name, hour)
        print("  MB by hour:", " ".join(f"{size:.0f}" for size in found), flush=True)
        measured.append(found)
        left.append(float(behind))
    quarter = HOURS // 4
    ratios = [max(each[-quarter:]) / max(each[quarter : 2 * quarter]) for each in measured]
    what = f"tables and indexes, last quarter of {int(RATE * hour * HOURS):,} events / second quarter"
    yield Row(what, ratios, most=GOAL)
    yield Row("  MB at the end", [each[-1] for each in measured])
    yield Row("  events left behind at the end", left)
