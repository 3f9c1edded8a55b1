"""How long from commit to applied, across processes, on a system that is otherwise idle.

    python -m benchmarks.latency [--runs 5] [--events 1200]

This process commits one event each at 200 a second, at uneven distances so that nothing beats in time with the
doorbell; a relay in another process notes when its secondary is asked to apply them. The clock starts right before
COMMIT is sent, in some rows before the writer's transaction begins. The raw limit does the least there is to do, with
NOTIFY inside the writer's transaction, which is what an outbox must not do to its application. Polling alone is also
measured with a relay gone to its longest sleep, by events that come when it has long been idle. The first tenth of each
run warms up and does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import NamedTuple

import asyncpg
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.clocked import RAW_CHANNEL, WARM, Asked, emptied, relay_process
from benchmarks.ground import CONTENT, Nothing, Row, outbox_database, percentile
from outbox import SyncConfig, SyncEvent, SyncManager, SyncMode, record
from outbox.testing.postgres import EmbeddedPostgres

RAW_INSERT = "insert into raw (name, content) values ($1, $2)"
RAW_NOTIFY = "select pg_notify($1, '')"
TENANT = "tenant-1"
GAP = 1 / 200
# Long enough apart for a relay to be back at its longest sleep.
POLL = timedelta(milliseconds=50)
IDLE_GAP = 0.25
GOAL_P50, GOAL_P99, GOAL_POLL = 3.5, 11.0, 1.2

Commit = Callable[[str], Awaitable["Sent"]]


class Sent(NamedTuple):
    """When a transaction began, and when its COMMIT was sent."""

    begun: float
    committing: float


class Lags(NamedTuple):
    """Milliseconds until an event was applied, from both."""

    since_begun: list[float]
    since_commit: list[float]


def event(name: str) -> SyncEvent:
    return SyncEvent.update("Observation", name, CONTENT, tenant_id=TENANT)


@asynccontextmanager
async def outbox_commit(url: str, *, doorbell: bool = True) -> AsyncIterator[Commit]:
    """Yield what commits one event through the outbox."""
    engine = create_async_engine(url)
    manager = SyncManager(engine, config=SyncConfig(doorbell=doorbell))

    async def commit(name: str) -> Sent:
        begun, made = time.monotonic(), event(name)
        async with engine.connect() as connection:
            await record(connection, made)
            committing = time.monotonic()
            await connection.commit()
            manager.ring()
        return Sent(begun, committing)

    yield commit
    await manager.aclose()
    await engine.dispose()


@asynccontextmanager
async def raw_commit(url: str) -> AsyncIterator[Commit]:
    """Yield the same for the raw limit."""
    connection = await asyncpg.connect(url.replace("postgresql+asyncpg", "postgresql"))
    insert, notify = await connection.prepare(RAW_INSERT), await connection.prepare(RAW_NOTIFY)

    async def commit(name: str) -> Sent:
        begun = time.monotonic()
        async with connection.transaction():
            await insert.fetch(name, CONTENT)
            await notify.fetch(RAW_CHANNEL)
            return Sent(begun, time.monotonic())

    yield commit
    await connection.close()


async def paced(commit: Commit, events: int, gap: float, prefix: str = "") -> dict[str, Sent]:
    """Commit events one after another, each as far from the last as half a gap up to one and a half."""
    uneven, due = random.Random(f"{prefix}{events}"), time.monotonic()
    committed = {}
    for number in range(events):
        due += gap * uneven.uniform(0.5, 1.5)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        name = f"{prefix}{number}"
        committed[name] = await commit(name)
    return committed


async def lags(server: EmbeddedPostgres, database: str, asked: Asked, events: int, gap: float = GAP) -> Lags:
    """Commit events at a steady pace and see when the other process applied them."""
    await emptied(server, database)
    async with AsyncExitStack() as opened:
        relay = await opened.enter_async_context(relay_process(asked))
        committing = raw_commit(asked.url) if asked.raw else outbox_commit(asked.url, doorbell=asked.doorbell)
        commit = await opened.enter_async_context(committing)
        await commit(WARM)
        await relay.go()
        await relay.warm()
        committed = await paced(commit, events, gap)
        noted = await relay.finish(events + 1)
    counted = list(committed.items())[events // 10 :]
    taken = [[(noted.applied[name] - at) * 1000 for at in sent] for name, sent in counted]
    return Lags(*map(list, zip(*taken, strict=True)))


async def waits(server: EmbeddedPostgres, database: str, pairs: int) -> dict[SyncMode, list[float]]:
    """Milliseconds that `SyncManager.sync` takes of its caller, in turns without and with waiting."""
    await emptied(server, database)
    url, modes = server.dsn(database), (SyncMode.ASYNCHRONOUS, SyncMode.SYNCHRONOUS)
    taken: dict[SyncMode, list[float]] = {mode: [] for mode in modes}
    engine = create_async_engine(url)
    manager = SyncManager(engine, [Nothing()])
    async with relay_process(Asked(url)) as relay:
        await manager.sync(event(WARM))
        await relay.go()
        await relay.warm()
        for number in range(pairs):
            for mode in modes:
                await asyncio.sleep(GAP * 2)
                started = time.monotonic()
                statuses = await manager.sync(event(f"{number}-{mode}"), mode=mode, timeout=30)
                taken[mode].append((time.monotonic() - started) * 1000)
                assert mode is SyncMode.ASYNCHRONOUS or all(status.synced for status in statuses)
    await manager.aclose()
    await engine.dispose()
    return {mode: each[pairs // 10 :] for mode, each in taken.items()}


async def bells(server: EmbeddedPostgres, database: str, runs: int, events: int) -> AsyncIterator[Row]:
    """Yield the doorbell's rows, each run beside one of the raw limit."""
    url = server.dsn(database)
    pairs = []
    for _ in range(runs):
        limit = await lags(server, database, Asked(url, raw=True), events)
        pairs.append((limit, await lags(server, database, Asked(url), events)))
    for percent, most in ((50, GOAL_P50), (99, GOAL_P99)):
        for since, bound in (("since_commit", most), ("since_begun", None)):
            measured = [[percentile(getattr(each, since), percent) for each in pair] for pair in pairs]
            limits, ours = (list(side) for side in zip(*measured, strict=True))
            what = "commit to applied" if bound else "begin to applied"
            yield Row(f"{what} at 200/s, doorbell, p{percent} ms", ours, most=bound)
            ratio = [mine / limit for limit, mine in measured]
            yield Row(f"  / raw LISTEN/NOTIFY ({statistics.median(limits):.2f} ms), p{percent}", ratio)


async def polls(server: EmbeddedPostgres, database: str, runs: int, events: int) -> AsyncIterator[Row]:
    """Yield the rows of polling alone: as a multiple of the interval when idle, and in ms at the steady rate."""
    silent = Asked(server.dsn(database), doorbell=False, poll_interval=POLL)
    idle = [await lags(server, database, silent, max(20, events // 20), IDLE_GAP) for _ in range(runs)]
    interval = POLL / timedelta(milliseconds=1)
    for percent, most in ((50, GOAL_POLL), (99, None)):
        multiples = [percentile(each.since_commit, percent) / interval for each in idle]
        yield Row(f"polling alone, relay idle, p{percent} / poll interval ({interval:g} ms)", multiples, most=most)
    steady = [await lags(server, database, Asked(silent.url, doorbell=False), events) for _ in range(runs)]
    for percent in (50, 99):
        yield Row(f"polling alone at 200/s, p{percent} ms", [percentile(each.since_commit, percent) for each in steady])


async def modes(server: EmbeddedPostgres, database: str, runs: int, pairs: int) -> AsyncIterator[Row]:
    """Yield what waiting adds to a caller."""
    measured = [await waits(server, database, pairs) for _ in range(runs)]
    for percent in (50, 99):
        plain, waited = ([percentile(each[mode], percent) for each in measured] for mode in measured[0])
        added = [after - before for before, after in zip(plain, waited, strict=True)]
        medians = f"{statistics.median(waited):.1f} / {statistics.median(plain):.1f} ms"
        yield Row(f"synchronous adds, p{percent} ms ({medians})", added)


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0, events: int = 1_200) -> AsyncIterator[Row]:
    """Yield the doorbell beside the raw limit, polling alone, and the synchronous mode."""
    events = max(60, int(events * scale))
    async with outbox_database(server) as name:
        for some in (bells, polls, modes):
            count = events if some is not modes else events // 4
            async for row in some(server, name, runs, count):
                yield row


async def measure(server: EmbeddedPostgres, runs: int, events: int) -> None:
    async for row in rows(server, runs, events=events):
        print(row, flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--events", type=int, default=1_200)
    given = arguments.parse_args()
    with EmbeddedPostgres() as server:
        asyncio.run(measure(server, given.runs, given.events))


if __name__ == "__main__":
    main()
