"""What 2,000 callers of `wait_for_sync` cost, on an engine with five connections.

    python -m benchmarks.waiters [--runs 5] [--waiters 2000]

Each caller waits for an event of its own. They all wait before a relay in another process begins, so nobody in this one
hears of what it settles: callers learn it from the poller they share, whose statements are counted. The clock starts
when the last delivery is applied, and settling it is part of what is measured. A caller is looked after again when a
tenth of its wait is over, so how long they have waited by then is said as well.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from benchmarks.clocked import WARM, Asked, emptied, relay_process
from benchmarks.ground import CONTENT, Nothing, Row, outbox_database
from outbox import SyncEvent, SyncManager, SyncToken, record
from outbox.testing.postgres import EmbeddedPostgres

WAITERS = 2_000
SINGLES = 30
# The poller's longest sleep, two looks, and room for a busy machine.
MOST_MS = 500
# 2,000 who each asked for themselves, at their longest sleep, would be 10,000 a second.
MOST_STATEMENTS = 200
# How long the relay stays away: hardly, and long enough for all to be at their longest sleep.
AWAY = (0.0, 3.0)
_TIMEOUT = 60.0
_BETWEEN = 0.1


class Crowd(NamedTuple):
    """One run: milliseconds from the last applied to the last told, seconds waited, statements a second."""

    told_ms: float
    waited: float
    statements: float
    most_connections: int


class Counted:
    """Counts what an engine executes, and how many of its connections are out at once."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.statements = self.most_connections = 0
        self._pool = engine.pool
        event.listen(engine.sync_engine, "before_cursor_execute", self._count)

    def _count(self, *_: Any) -> None:
        self.statements += 1
        self.most_connections = max(self.most_connections, self._pool.checkedout())  # type: ignore[attr-defined]


@asynccontextmanager
async def small_engine(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url, pool_size=5, max_overflow=0)
    yield engine
    await engine.dispose()


async def committed(manager: SyncManager, names: Sequence[str]) -> list[SyncToken]:
    """Record one event each in one transaction; return a token for each."""
    made = [SyncEvent.update("Observation", name, CONTENT, tenant_id="tenant-1") for name in names]
    async with manager.engine.begin() as connection:
        tokens = [await record(connection, each) for each in made]
    manager.ring()
    return tokens


async def told(manager: SyncManager, token: SyncToken) -> float:
    """Wait as a caller does; return when it was told."""
    result = await manager.wait_for_sync(token, timeout=_TIMEOUT)
    at = time.monotonic()
    assert result, result
    return at


async def crowd(server: EmbeddedPostgres, database: str, waiters: int, away: float) -> Crowd:
    """All wait for one event each, and the relay begins only after a while."""
    await emptied(server, database)
    url = server.dsn(database)
    async with relay_process(Asked(url)) as relay, small_engine(url) as engine:
        manager = SyncManager(engine, [Nothing()])
        tokens = await committed(manager, [str(number) for number in range(waiters)])
        counted, started = Counted(engine), time.monotonic()
        waiting = [asyncio.create_task(told(manager, token)) for token in tokens]
        while not counted.statements:
            await asyncio.sleep(_BETWEEN)
        await asyncio.sleep(away)
        await relay.go()
        last_told = max(await asyncio.gather(*waiting))
        noted = await relay.finish(waiters)
        await manager.aclose()
    last_applied, waited = max(noted.applied.values()), last_told - started
    return Crowd((last_told - last_applied) * 1000, waited, counted.statements / waited, counted.most_connections)


async def single(server: EmbeddedPostgres, database: str, times: int) -> tuple[list[float], list[float]]:
    """One waits, with nobody else and a relay that is idle: ms from applied to told, and from commit to told."""
    await emptied(server, database)
    url = server.dsn(database)
    ends: dict[str, tuple[float, float]] = {}
    async with relay_process(Asked(url)) as relay, small_engine(url) as engine:
        manager = SyncManager(engine, [Nothing()])
        await committed(manager, [WARM])
        await relay.go()
        await relay.warm()
        for number in range(times):
            await asyncio.sleep(_BETWEEN)
            [token] = await committed(manager, [str(number)])
            ends[str(number)] = (time.monotonic(), await told(manager, token))
        noted = await relay.finish(times + 1)
        await manager.aclose()
    counted = list(ends.items())[times // 10 :]
    after = [(at - noted.applied[name]) * 1000 for name, (_, at) in counted]
    return after, [(at - since) * 1000 for _, (since, at) in counted]


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0, events: int = WAITERS) -> AsyncIterator[Row]:
    """Yield how soon the last of many is told, what the poller asks meanwhile, and how soon one alone is."""
    waiters = max(20, int(events * scale))
    async with outbox_database(server) as name:
        for away in AWAY:
            crowds = [await crowd(server, name, waiters, away) for _ in range(runs)]
            waited = statistics.median(each.waited for each in crowds)
            what = f"last of {waiters:,} waiters told, ms after applied ({waited:.1f} s waited)"
            yield Row(what, [each.told_ms for each in crowds], most=MOST_MS)
            most = max(each.most_connections for each in crowds)
            what = f"  statements/s of their poller, at most {most} connection at once"
            yield Row(what, [each.statements for each in crowds], most=MOST_STATEMENTS)
        singles = [await single(server, name, max(5, int(SINGLES * min(1.0, scale)))) for _ in range(runs)]
        yield Row("a single waiter told, ms after applied, p50", [statistics.median(each[0]) for each in singles])
        yield Row("a single waiter told, ms after committed, p50", [statistics.median(each[1]) for each in singles])


async def measure(server: EmbeddedPostgres, runs: int, waiters: int) -> None:
    async for row in rows(server, runs, events=waiters):
        print(row, flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--waiters", type=int, default=WAITERS)
    given = arguments.parse_args()
    with EmbeddedPostgres() as server:
        asyncio.run(measure(server, given.runs, given.waiters))


if __name__ == "__main__":
    main()
