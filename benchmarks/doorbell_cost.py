"""What ringing the relays of other processes costs 32 writers.

    python -m benchmarks --only doorbell_cost [--runs 5] [--scale 1.0]

Each transaction records one event of 500 bytes, on its own connection, and a relay in another process carries them,
with the doorbell on and off in turns; then nobody carries, and one connection listens. The bell is rung after the
commit and outside of the transaction, by one NOTIFY per 5 ms and process at most.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import count
from typing import Protocol

import asyncpg
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.clocked import WARM, Asked, emptied, relay_process
from benchmarks.ground import Row, outbox_database
from benchmarks.latency import event, outbox_commit
from outbox import SyncConfig, SyncManager, record
from outbox.schema import LISTEN_CHANNEL
from outbox.testing.postgres import EmbeddedPostgres

WRITERS = 32
TRANSACTIONS = 12_000
GOAL = 0.95


class Beside(Protocol):
    """What else goes on while they write."""

    def __call__(
        self, server: EmbeddedPostgres, database: str, *, doorbell: bool
    ) -> AbstractAsyncContextManager[None]: ...


async def write(connection: asyncpg.Connection, manager: SyncManager, names: Iterator[int], times: int) -> None:
    """Commit events one after another, and ring."""
    for _ in range(times):
        async with connection.transaction():
            await record(connection, event(str(next(names))))
        manager.ring()


@asynccontextmanager
async def heard(server: EmbeddedPostgres, database: str, *, doorbell: bool) -> AsyncIterator[None]:
    """Have somebody listen, and nobody carry: what is left is the bell's own cost."""
    connection = await asyncpg.connect(server.dsn(database, driver="postgresql"))
    await connection.add_listener(LISTEN_CHANNEL, lambda *_: None)
    yield
    await connection.close()


@asynccontextmanager
async def carried(server: EmbeddedPostgres, database: str, *, doorbell: bool) -> AsyncIterator[None]:
    """Have a relay in another process carry what is written."""
    # Nothing is noted of single events: that would be most of what the process does.
    asked = Asked(server.dsn(database), noise="", doorbell=doorbell)
    async with relay_process(asked) as relay, outbox_commit(asked.url) as commit:
        await commit(WARM)
        await relay.go()
        await relay.warm()
        yield
        await relay.finish(1)


async def written(
    server: EmbeddedPostgres, database: str, beside: Beside, transactions: int, *, doorbell: bool
) -> float:
    """Return the transactions per second of all writers together."""
    await emptied(server, database)
    engine = create_async_engine(server.dsn(database))
    manager = SyncManager(engine, config=SyncConfig(doorbell=doorbell))
    opened = [await asyncpg.connect(server.dsn(database, driver="postgresql")) for _ in range(WRITERS)]
    async with beside(server, database, doorbell=doorbell):
        names, started = count(), time.perf_counter()
        await asyncio.gather(*(write(each, manager, names, transactions // WRITERS) for each in opened))
        elapsed = time.perf_counter() - started
    for connection in opened:
        await connection.close()
    await manager.aclose()
    await engine.dispose()
    return transactions // WRITERS * WRITERS / elapsed


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0) -> AsyncIterator[Row]:
    """Yield the writers' throughput with the doorbell as a ratio to that without."""
    transactions = max(WRITERS * 10, int(TRANSACTIONS * scale))
    beside: dict[str, tuple[Beside, float | None]] = {
        "beside a relay": (carried, GOAL),
        "beside a listener": (heard, None),
    }
    async with outbox_database(server) as name:
        for where, (how, goal) in beside.items():
            pairs = []
            for run in range(runs):
                order = (False, True) if run % 2 else (True, False)
                rates = {bell: await written(server, name, how, transactions, doorbell=bell) for bell in order}
                pairs.append((rates[True], rates[False]))
            rung, silent = (statistics.median(side) for side in zip(*pairs, strict=True))
            what = f"{WRITERS} writers with the doorbell / without, {where} ({rung:,.0f} / {silent:,.0f} tx/s)"
            yield Row(what, [on / off for on, off in pairs], least=goal)
