"""What recording costs a business transaction: against hand-written SQL, and against not recording.

    python -m benchmarks --only writer_overhead [--runs 5] [--scale 1.0]

One transaction inserts one business row and one event of 500 bytes, at 1, 8 and 32 connections and owed to 1, 3 and 16
secondaries. All variants take turns in short blocks, and ratios are taken run by run. The sessions are compared with a
session that records nothing: in rate, and in CPU time of this process.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from itertools import count
from typing import NamedTuple

import asyncpg
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.ground import Nothing, Row, outbox_database
from benchmarks.writer_variants import BUSINESS_TABLE, VARIANTS, Ground, Transaction, tracked_by
from outbox import SyncConfig, SyncManager
from outbox.testing.postgres import EmbeddedPostgres

TRANSACTIONS = 2_000
CONNECTIONS = (1, 8, 32)
SECONDARIES = (1, 3, 16)
EMPTY = "truncate business, outbox, outbox_delivery"
BLOCKS = 10
GOAL_BY_HAND = 0.95
# At eight connections, by the number of secondaries.
GOAL_BARE = {1: 0.8, 3: 0.7}
GOAL_CPU_MS = 0.25
GOAL_SIXTEEN = 2.0

# What is said of it, and which two it compares.
RATIOS = [
    ("record() / by hand", "recorded", "by_hand"),
    ("record() / no event", "recorded", "bare"),
    ("by hand / no event", "by_hand", "bare"),
    ("make and record() / by hand", "checked_and_recorded", "by_hand"),
    ("session.record / session", "session_record", "plain_session"),
    ("captured / session", "captured", "plain_session"),
]


class Spent(NamedTuple):
    """What a transaction of one variant took: seconds, of all connections together, and seconds of this CPU."""

    wall: float
    cpu: float


Run = dict[str, Spent]


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0) -> AsyncIterator[Row]:
    """Yield a row for each ratio, at each number of connections and secondaries."""
    transactions = max(32 * BLOCKS, int(TRANSACTIONS * scale))
    async with AsyncExitStack() as opened:
        databases = {}
        for secondaries in SECONDARIES:
            name = await opened.enter_async_context(outbox_database(server, f"bench_{secondaries}"))
            databases[secondaries] = server.dsn(name, driver="postgresql")
            await _prepare(server.dsn(name), _names(secondaries))
        for connections in CONNECTIONS:
            # The numbers of secondaries take turns within a run, because they are compared with each other too.
            measured = [
                {
                    each: await spent(databases[each], _names(each), connections, transactions, run)
                    for each in SECONDARIES
                }
                for run in range(runs)
            ]
            for secondaries in SECONDARIES:
                for row in compared([each[secondaries] for each in measured], connections, secondaries):
                    yield row
            yield sixteen(measured, connections)


def compared(runs: list[Run], connections: int, secondaries: int) -> Iterator[Row]:
    """Yield what one number of connections and secondaries shows."""
    where = f"{connections} conn., {secondaries} secondaries"
    for what, above, below in RATIOS:
        rates = [1 / statistics.median(each[name].wall for each in runs) for name in (above, below)]
        values = [each[below].wall / each[above].wall for each in runs]
        least = _goal(what, connections, secondaries)
        yield Row(f"{what}, {where} ({rates[0]:,.0f} / {rates[1]:,.0f} tx/s)", values, least=least)
    for name in ("session_record", "captured"):
        cpu = [(each[name].cpu - each["plain_session"].cpu) * 1000 for each in runs]
        yield Row(f"{name.replace('_', '.')}, client CPU ms per event, {where}", cpu, most=GOAL_CPU_MS)
    if connections == 8:
        rates = [1 / each["recorded"].wall for each in runs]
        yield Row(f"  record(), tx/s, {where}", rates, curve="recording:record(), 8 connections", x=secondaries)


def sixteen(measured: list[dict[int, Run]], connections: int) -> Row:
    """Return what owing to sixteen secondaries costs as a multiple of owing to one."""
    values = [each[16]["recorded"].wall / each[1]["recorded"].wall for each in measured]
    return Row(f"record() for 16 secondaries, time / for one, {connections} conn.", values, most=GOAL_SIXTEEN)


def _goal(what: str, connections: int, secondaries: int) -> float | None:
    if what == "record() / by hand":
        return GOAL_BY_HAND
    return GOAL_BARE.get(secondaries) if what == "record() / no event" and connections == 8 else None


async def spent(dsn: str, secondaries: list[str], connections: int, transactions: int, run: int) -> Run:
    """Time each variant, all taking turns block by block so that noise hits them alike."""
    engine = create_async_engine(dsn.replace("postgresql://", "postgresql+asyncpg://"), pool_size=connections)
    manager = SyncManager(engine, config=SyncConfig(doorbell=False))
    tracked = tracked_by(manager)
    opened = [await asyncpg.connect(dsn) for _ in range(connections)]
    await opened[0].execute(EMPTY)
    await opened[0].execute("checkpoint")
    grounds = [Ground(each, manager, tracked, secondaries) for each in opened]
    made = {name: [await variant(ground) for ground in grounds] for name, variant in VARIANTS.items()}
    blocks: dict[str, list[Spent]] = {name: [] for name in made}
    size, numbers = transactions // connections // BLOCKS, count()
    for block in range(-1, BLOCKS):
        for name in _turned(list(made), run + block):
            taken = await _block(made[name], numbers, size)
            # The first block warms caches and plans up.
            blocks[name] += [taken] if block >= 0 else []
    for connection in opened:
        await connection.close()
    await engine.dispose()
    times = size * BLOCKS * connections
    return {name: Spent(*(sum(side) / times for side in zip(*each, strict=True))) for name, each in blocks.items()}


async def _block(transactions: list[Transaction], numbers: Iterator[int], times: int) -> Spent:
    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(_repeat(transaction, numbers, times) for transaction in transactions))
    return Spent(time.perf_counter() - started, time.process_time() - cpu)


async def _repeat(transaction: Transaction, numbers: Iterator[int], times: int) -> None:
    for _ in range(times):
        await transaction(next(numbers))


def _turned(names: list[str], turn: int) -> list[str]:
    """Who comes first, and who after whom, changes from block to block."""
    first = turn % len(names)
    order = names[first:] + names[:first]
    return order if turn % 2 else order[::-1]


def _names(secondaries: int) -> list[str]:
    return [f"secondary-{number}" for number in range(secondaries)]


async def _prepare(url: str, secondaries: list[str]) -> None:
    engine = create_async_engine(url)
    await SyncManager(engine, [Nothing(name) for name in secondaries]).register()
    async with engine.begin() as connection:
        await connection.exec_driver_sql(BUSINESS_TABLE)
    await engine.dispose()
