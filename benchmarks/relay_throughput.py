"""Relay throughput as a ratio to the floor: select for update skip locked, then delete, in one transaction.

    python -m benchmarks.relay_throughput [--runs 5] [--events 120000]

Each pair of runs drains the same number of events of 500 bytes, with content in hand and one process; the floor keeps
its content in the claimed row, has no lease, no attempt record and no order. Ratios are taken pair by pair.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator

import asyncpg
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.ground import CONTENT, FILL, Nothing, Row, outbox_database
from outbox import SyncConfig, SyncManager
from outbox.testing.postgres import EmbeddedPostgres

FLOOR_TABLE = "create table floor (id bigint generated always as identity primary key, content json not null)"
FLOOR_FILL = "insert into floor (content) select $2::json from generate_series(1, $1)"
FLOOR_CLAIM = "select id, content from floor order by id limit $1 for update skip locked"
FLOOR_DELETE = "delete from floor where id = any ($1)"
GOAL = 0.5


async def floor(dsn: str, events: int, batch: int) -> float:
    connection = await asyncpg.connect(dsn)
    await connection.execute("drop table if exists floor")
    await connection.execute(FLOOR_TABLE)
    await connection.execute(FLOOR_FILL, events, CONTENT)
    await connection.execute("vacuum analyze floor")
    await connection.execute("checkpoint")
    secondary, started = Nothing(), time.perf_counter()
    while True:
        async with connection.transaction():
            rows = await connection.fetch(FLOOR_CLAIM, batch)
            if not rows:
                break
            secondary.characters += sum(len(row[1]) for row in rows)
            await connection.execute(FLOOR_DELETE, [row[0] for row in rows])
    rate = events / (time.perf_counter() - started)
    await connection.close()
    return rate


async def ours(dsn: str, events: int, batch: int, tenants: int) -> float:
    engine = create_async_engine(dsn.replace("postgresql://", "postgresql+asyncpg://"))
    secondary = Nothing()
    manager = SyncManager(engine, [secondary], config=SyncConfig(batch_size=batch, doorbell=False))
    await manager.register()
    connection = await asyncpg.connect(dsn)
    await connection.execute("truncate outbox, outbox_delivery, outbox_attempt, outbox_hold")
    await connection.execute(FILL, events, tenants, CONTENT, secondary.backend_id)
    await connection.execute("vacuum analyze outbox, outbox_delivery")
    await connection.execute("checkpoint")
    await connection.close()
    relay = manager.relay()
    running = asyncio.create_task(relay.run())
    # As the floor has connected before its clock starts, ours starts with the first batch.
    while not (before := secondary.seen):
        await asyncio.sleep(0.0005)
    started = time.perf_counter()
    while secondary.seen < events:
        await asyncio.sleep(0.002)
    rate = (events - before) / (time.perf_counter() - started)
    relay.stop()
    await running
    await engine.dispose()
    return rate


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0, events: int = 120_000) -> AsyncIterator[Row]:
    """Yield a row for each batch size and number of tenants."""
    events = max(1_000, int(events * scale))
    async with outbox_database(server) as name:
        dsn = server.dsn(name, driver="postgresql")
        for batch in (100, 500):
            for tenants in (1, 100):
                pairs = [
                    (await floor(dsn, events, batch), await ours(dsn, events, batch, tenants)) for _ in range(runs)
                ]
                rates = [statistics.median(side) for side in zip(*pairs, strict=True)]
                what = f"relay / floor, batch {batch}, {tenants} tenants ({rates[1]:,.0f} / {rates[0]:,.0f} events/s)"
                yield Row(what, [mine / base for base, mine in pairs], least=GOAL)


async def measure(server: EmbeddedPostgres, runs: int, events: int) -> None:
    async for row in rows(server, runs, events=events):
        print(row, flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--events", type=int, default=120_000)
    given = arguments.parse_args()
    with EmbeddedPostgres() as server:
        asyncio.run(measure(server, given.runs, given.events))


if __name__ == "__main__":
    main()
