"""How fast a relay is with much more owed than it will carry: five million must not be slower than a hundred thousand.

    python -m benchmarks --only deep_backlog [--runs 5] [--scale 1.0]

Each depth has a database of its own, filled once and topped up before every run; the depths take turns within a run.
What is carried per run is the same, at most half of what is owed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import asyncpg
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.drained import Asked, drained
from benchmarks.ground import Nothing, Row, outbox_database
from benchmarks.memory import top_up
from outbox import SyncManager
from outbox.testing.postgres import EmbeddedPostgres

SHALLOW, DEEP = 100_000, 5_000_000
DEPTHS = (10_000, SHALLOW, 1_000_000, DEEP)
CARRIED = 50_000
BATCH = 100
GOAL = 0.9


async def rate(dsn: str, depth: int, carried: int) -> float:
    """Carry some of what is owed; return how many per second."""
    await top_up(dsn, depth)
    connection = await asyncpg.connect(dsn)
    await connection.execute("checkpoint")
    await connection.close()
    return (await drained(Asked(dsn, BATCH, most=carried))).rate


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0) -> AsyncIterator[Row]:
    """Yield the rate at each depth, and that of the deepest as a ratio to the shallow one's."""
    depths = {depth: max(2_000, int(depth * scale)) for depth in DEPTHS}
    async with AsyncExitStack() as opened:
        databases = {}
        for depth in DEPTHS:
            name = await opened.enter_async_context(outbox_database(server, f"bench_{depth}"))
            databases[depth] = server.dsn(name, driver="postgresql")
            engine = create_async_engine(server.dsn(name))
            await SyncManager(engine, [Nothing()]).register()
            await engine.dispose()
        measured = []
        for _ in range(runs):
            owed = {depth: min(depths[depth] // 2, max(1_000, int(CARRIED * scale))) for depth in DEPTHS}
            measured.append({each: await rate(databases[each], depths[each], owed[each]) for each in DEPTHS})
    for depth, pending in depths.items():
        rates = [each[depth] for each in measured]
        yield Row(f"events/s with {pending:,} owed, batch {BATCH}", rates, curve="pending:batch 100", x=pending)
    ratios = [each[DEEP] / each[SHALLOW] for each in measured]
    yield Row(f"rate with {depths[DEEP]:,} owed / with {depths[SHALLOW]:,}", ratios, least=GOAL)
