"""Relaying to real servers, against the same adapter driven by a bare loop over batches made beforehand.

    python -m benchmarks --only real_secondaries [--runs 5] [--scale 1.0]

An OpenSearch-compatible index, Valkey, PostgreSQL (a server of its own) and MariaDB; events of 500 bytes of four
tenants in batches of 100. The goal is against one loop that waits for each batch; a second row is against as many loops
at once as the relay has attempts in flight. A server that is not installed is a row that says so.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import count

import asyncpg
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.drained import Marks
from benchmarks.ground import CONTENT, Row, fill, outbox_database
from outbox import Operation, Outcome, Secondary, SyncConfig, SyncEvent, SyncManager
from outbox.secondaries.base import Closeable
from outbox.secondaries.opensearch import OpenSearchSecondary
from outbox.secondaries.sql import SqlSecondary
from outbox.secondaries.valkey import ValkeySecondary
from outbox.testing.child import ServerMissing
from outbox.testing.postgres import EmbeddedPostgres
from outbox.testing.servers import MariaDBServer, OpenSearchServer, ValkeyServer

EVENTS = 20_000
BATCH = 100
TENANTS = 4
GOAL = 0.8
NAME = "second"
SERVERS: dict[str, type[OpenSearchServer | ValkeyServer | EmbeddedPostgres | MariaDBServer]] = {
    "OpenSearch-compatible": OpenSearchServer,
    "Valkey": ValkeyServer,
    "PostgreSQL": EmbeddedPostgres,
    "MariaDB": MariaDBServer,
}
IN_FLIGHT = SyncConfig().attempts_in_flight
# Positions beyond any that the outbox gives here, and ever higher; each run has keys of its own on both sides.
_positions = count(2**40)
_LOOK = 0.002


class Watched:
    """The adapter, its batches' sizes and times noted when they are done."""

    def __init__(self, secondary: Secondary) -> None:
        self.backend_id = secondary.backend_id
        self.scan = secondary.scan
        self.marks = Marks([], [])
        self._secondary = secondary

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        outcomes = await self._secondary.apply(batch)
        self.marks.add(len(batch))
        return outcomes


def adapter(server: AbstractContextManager[object]) -> Secondary:
    """Return the adapter of a server that runs."""
    match server:
        case OpenSearchServer():
            return OpenSearchSecondary(NAME, server.url)
        case ValkeyServer():
            return ValkeySecondary(NAME, server.url)
        case MariaDBServer():
            return SqlSecondary(NAME, server.url)
        case EmbeddedPostgres():
            return SqlSecondary(NAME, server.dsn())
    raise AssertionError(server)


def batches(events: int) -> list[list[SyncEvent]]:
    """Make what the bare loop hands over."""
    made = [_event(next(_positions)) for _ in range(events)]
    return [made[start : start + BATCH] for start in range(0, events, BATCH)]


def _event(number: int) -> SyncEvent:
    tenant = f"tenant-{number % TENANTS}"
    return SyncEvent(tenant, "Observation", str(number), Operation.UPDATE, CONTENT, position=number)


async def bare(secondary: Secondary, events: int, loops: int) -> float:
    """Hand over prepared batches by so many loops; return events per second."""
    given, started = iter(batches(events)), time.perf_counter()
    await asyncio.gather(*(_loop(secondary, given) for _ in range(loops)))
    return events / (time.perf_counter() - started)


async def _loop(secondary: Secondary, given: Iterator[list[SyncEvent]]) -> None:
    for batch in given:
        await secondary.apply(batch)


async def relayed(server: EmbeddedPostgres, database: str, secondary: Secondary, start: int, events: int) -> float:
    """Relay as many events through the outbox; return events per second from the first batch on."""
    engine, watched = create_async_engine(server.dsn(database)), Watched(secondary)
    manager = SyncManager(engine, [watched], config=SyncConfig(batch_size=BATCH, doorbell=False))
    await manager.register()
    connection = await asyncpg.connect(server.dsn(database, driver="postgresql"))
    await fill(connection, events, tenants=TENANTS, backend_ids=[NAME], start=start)
    await connection.execute("vacuum analyze outbox, outbox_delivery")
    await connection.execute("checkpoint")
    await connection.close()
    relay = manager.relay()
    running = asyncio.create_task(relay.run())
    while watched.marks.total < events:
        assert not running.done(), "the relay ended"
        await asyncio.sleep(_LOOK)
    relay.stop()
    await running
    await engine.dispose()
    sizes, times = watched.marks.sizes, watched.marks.times
    return sum(sizes[1:]) / (times[-1] - times[0])


async def compared(server: EmbeddedPostgres, what: str, runs: int, events: int) -> AsyncIterator[Row]:
    """Yield the rows of one kind of server. Raises `ServerMissing`."""
    with SERVERS[what]() as there:
        async with outbox_database(server) as name:
            secondary, measured = adapter(there), []
            await bare(secondary, BATCH, 1)
            for run in range(runs):
                loops = [await bare(secondary, events, loops) for loops in (1, IN_FLIGHT)]
                measured.append((await relayed(server, name, secondary, 1 + run * events, events), *loops))
            if isinstance(secondary, Closeable):
                await secondary.aclose()
    rates = [statistics.median(side) for side in zip(*measured, strict=True)]
    for at, loops, goal in ((1, "a bare loop", GOAL), (2, f"{IN_FLIGHT} bare loops at once", None)):
        ratios = [each[0] / each[at] for each in measured]
        yield Row(f"{what}: relay / {loops} ({rates[0]:,.0f} / {rates[at]:,.0f} events/s)", ratios, least=goal)


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0) -> AsyncIterator[Row]:
    """Yield the relay as a ratio to a bare loop, server by server."""
    for what in SERVERS:
        try:
            async for row in compared(server, what, runs, max(1_000, int(EVENTS * scale))):
                yield row
        except ServerMissing as error:
            yield Row(f"{what}: not measured: {error}", [], least=GOAL)
