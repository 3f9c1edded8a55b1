"""What somebody's forgotten transaction, which has written, does to the delivery of everybody else's events.

    python -m benchmarks --only idle_writer [--runs 5] [--scale 1.0]

It holds the snapshot's xmin of the whole cluster where it is. A reader behind that xmin delivers nothing at all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from benchmarks.clocked import Asked
from benchmarks.ground import Row, outbox_database, percentile
from benchmarks.latency import lags
from outbox.testing.postgres import EmbeddedPostgres

EVENTS = 2_000
GOAL_MS = 1_000
TABLE = "create table if not exists elsewhere (id bigint)"


@asynccontextmanager
async def idle_writer(dsn: str) -> AsyncIterator[None]:
    """Hold a transaction that has written, in the same database."""
    connection = await asyncpg.connect(dsn)
    await connection.execute(TABLE)
    await connection.execute("begin; insert into elsewhere values (1)")
    assert await connection.fetchval("select pg_current_xact_id_if_assigned()") is not None
    yield
    await connection.close()


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0) -> AsyncIterator[Row]:
    """Yield p99 beside the idle writer and without; every event must have been applied, or this fails."""
    events = max(100, int(EVENTS * scale))
    async with outbox_database(server) as name:
        asked = Asked(server.dsn(name))
        found, alone = [], []
        for _ in range(runs):
            alone.append(await lags(server, name, asked, events))
            async with idle_writer(server.dsn(name, driver="postgresql")):
                found.append(await lags(server, name, asked, events))
        beside = [percentile(each.since_commit, 99) for each in found]
        yield Row("commit to applied at 200/s beside an idle writer, p99 ms", beside, most=GOAL_MS)
        yield Row("  the same without, p99 ms", [percentile(each.since_commit, 99) for each in alone])
