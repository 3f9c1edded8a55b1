"""What a backfill does to live events: how long they take while it runs, against without, and how fast it is.

    python -m benchmarks.backfill [--runs 3] [--resources 1000000] [--rate 500] [--most-owed 200]

Live events are committed one by one at 500 a second by this process, a relay carries them in another, and the backfill
runs in a third, all on one machine. The clock of a live event starts right before COMMIT and ends when the secondary is
asked to apply it. In each run the live events go alone first, then for as long as the backfill takes; all of them, and
every resource, must have arrived at the end. Once the live events are of another tenant than the resources, and once of
the same one, in whose lane they stand behind what the backfill has recorded.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.clocked import WARM, Asked, emptied, relay_process
from benchmarks.ground import CONTENT, Nothing, Row, outbox_database, percentile
from benchmarks.latency import TENANT, Commit, Sent, outbox_commit
from outbox import SyncManager
from outbox.backfill import MOST_OWED
from outbox.testing.postgres import EmbeddedPostgres

RESOURCES = 1_000_000
LIVE_RATE = 500.0
ALONE_SECONDS = 10.0
GOAL = 2.0
NOISE = "row-"
APART = "tenant-2"
FILL = """
create table observation (id integer primary key, content text not null);
insert into observation select n, '{content}' from generate_series(1, {resources}) as n;
analyze observation
"""


class Base(DeclarativeBase): ...


class Observation(Base):
    __tablename__ = "observation"
    id: Mapped[int] = mapped_column(primary_key=True)
    content: Mapped[str]


async def fill(url: str, tenant: str, most_owed: int) -> None:
    """The third process: backfill, and say how many resources a second that was."""
    engine = create_async_engine(url)
    manager = SyncManager(engine, [Nothing()])
    manager.track(
        Observation,
        tenant=tenant,
        resource_id=lambda row: f"{NOISE}{row.id}",
        content=lambda row: row.content,
    )
    done = await manager.backfill(Nothing().backend_id, most_owed=most_owed)
    print(done.recorded, done.per_second, flush=True)
    await manager.aclose()
    await engine.dispose()


async def paced_until(commit: Commit, rate: float, ended: Callable[[], bool]) -> dict[str, Sent]:
    """Commit events one after another at uneven distances, until it is over."""
    uneven, due = random.Random(1), time.monotonic()
    committed: dict[str, Sent] = {}
    while not ended():
        due += uneven.uniform(0.5, 1.5) / rate
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        committed[str(len(committed))] = await commit(str(len(committed)))
    return committed


async def lags(
    server: EmbeddedPostgres, database: str, rate: float, filling: Callable[[], Awaitable[int]]
) -> list[float]:
    """Milliseconds from commit to applied of the live events that were committed while `filling` went on."""
    await emptied(server, database)
    async with AsyncExitStack() as opened:
        relay = await opened.enter_async_context(relay_process(Asked(server.dsn(database), noise=NOISE)))
        commit = await opened.enter_async_context(outbox_commit(server.dsn(database)))
        await commit(WARM)
        await relay.go()
        await relay.warm()
        going = asyncio.ensure_future(filling())
        sent = await paced_until(commit, rate, going.done)
        noted = await relay.finish(1 + len(sent) + await going)
    # In state order, as here, each resource comes once: what is missing would not have let the relay finish.
    found = [(noted.applied[name] - each.committing) * 1000 for name, each in sent.items()]
    return found[len(found) // 10 :]


async def compared(
    server: EmbeddedPostgres, database: str, tenant: str, rate: float, most_owed: int
) -> tuple[list[float], list[float], float]:
    """Return the lags alone and beside a backfill, and how many resources it recorded per second."""
    speed: list[float] = []

    async def nothing() -> int:
        await asyncio.sleep(ALONE_SECONDS)
        return 0

    async def backfill() -> int:
        command = [sys.executable, "-m", "benchmarks.backfill", "--child", server.dsn(database), tenant, str(most_owed)]
        child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=os.environ)
        said, _ = await child.communicate()
        recorded, per_second = said.split()
        speed.append(float(per_second))
        return int(recorded)

    alone = await lags(server, database, rate, nothing)
    connection = await asyncpg.connect(server.dsn(database, driver="postgresql"))
    await connection.execute("truncate outbox_backfill")
    await connection.close()
    return alone, await lags(server, database, rate, backfill), speed[0]


async def rows(
    server: EmbeddedPostgres,
    runs: int,
    scale: float = 1.0,
    rate: float = LIVE_RATE,
    most_owed: int = MOST_OWED,
) -> AsyncIterator[Row]:
    """Yield the lags of live events beside a backfill of another tenant and of their own, against alone."""
    resources = max(5_000, int(RESOURCES * scale))
    async with outbox_database(server) as name:
        connection: Any = await asyncpg.connect(server.dsn(name, driver="postgresql"))
        await connection.execute(FILL.format(content=CONTENT, resources=resources))
        await connection.close()
        for where, tenant in (("another tenant's", APART), ("its own tenant's", TENANT)):
            found = [await compared(server, name, tenant, rate, most_owed) for _ in range(runs)]
            yield Row(f"backfill of {resources:,} beside {rate:.0f} live/s, resources/s", [each[2] for each in found])
            for percent in (50, 99):
                before = [percentile(alone, percent) for alone, _, _ in found]
                after = [percentile(beside, percent) for _, beside, _ in found]
                yield Row(f"  live events alone, p{percent} ms", before)
                yield Row(
                    f"  beside {where} backfill / alone, p{percent}",
                    [late / early for early, late in zip(before, after, strict=True)],
                    most=GOAL if percent == 99 else None,
                )


async def measure(server: EmbeddedPostgres, runs: int, scale: float, rate: float, most_owed: int) -> None:
    async for row in rows(server, runs, scale, rate, most_owed):
        print(row, flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=3)
    arguments.add_argument("--resources", type=int, default=RESOURCES)
    arguments.add_argument("--rate", type=float, default=LIVE_RATE)
    arguments.add_argument("--most-owed", type=int, default=MOST_OWED)
    arguments.add_argument("--child", nargs=3, metavar=("URL", "TENANT", "MOST_OWED"))
    given = arguments.parse_args()
    if given.child:
        url, tenant, most_owed = given.child
        asyncio.run(fill(url, tenant, int(most_owed)))
        return
    with EmbeddedPostgres() as server:
        asyncio.run(measure(server, given.runs, given.resources / RESOURCES, given.rate, given.most_owed))


if __name__ == "__main__":
    main()
