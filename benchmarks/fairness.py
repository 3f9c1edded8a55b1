"""What a tenant with a hundred times the load does to a quiet one's lag.

    python -m benchmarks.fairness [--runs 5] [--seconds 8]

A relay in another process carries both. What this machine can sustain is measured first, one tenant being written and
carried at the same time; the noisy tenant then gets half of that, in a transaction every 10 ms, and the quiet one a
hundredth of the noisy one's, each event committed on its own. The quiet one's lag goes from right before COMMIT to
applied, and is compared with its lag alone at the same rate, in the same run. With a backlog of the noisy tenant on
top, only quiet events that were committed while it stood count. Last, noise without a backlog comes from the quiet
tenant's own lane, as from one tenant in 64: lanes do not help there, and nothing is promised.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import asyncpg

from benchmarks.clocked import WARM, Asked, RelayProcess, emptied, relay_process
from benchmarks.ground import CONTENT, Nothing, Row, outbox_database, percentile
from benchmarks.latency import TENANT, outbox_commit, paced
from outbox.testing.postgres import EmbeddedPostgres

# In another lane than the quiet tenant, and in the same.
APART, BESIDE = "tenant-2", TENANT
SHARE = 0.5
TIMES = 100
BACKLOG = 100_000
CAPACITY_EVENTS = 30_000
CAPACITY_RUNS = 3
GOAL = 3.0
_CHUNK = 100
_TICK = 0.01

# Each call goes on where the last one ended, so that no key comes twice and nothing is superseded.
FILL_TENANT = """
with event as (
    insert into outbox (tenant_id, resource_type, resource_id, operation, content)
    select $1, 'Observation', 'noise-' || n, 'update', $2::json from generate_series($3::int, $3::int + $4 - 1) as n
    returning event_id, tenant_id, resource_type, resource_id
)
insert into outbox_delivery (backend_id, lane, event_id, key_hash)
select $5, (hashtextextended(tenant_id, 0) & 63)::smallint, event_id,
       hashtextextended(tenant_id || '/' || resource_type || '/' || resource_id, 0)
from event
"""


class Case(NamedTuple):
    """How much noise: events a second, how many are owed beforehand, and whose they are."""

    rate: float = 0.0
    backlog: int = 0
    tenant: str = APART


class Noise:
    """Commits events of one tenant, a fixed number a second."""

    def __init__(self, connection: asyncpg.Connection[Any], tenant: str) -> None:
        self.written = 0
        self._connection = connection
        self._tenant = tenant

    async def write(self, events: int) -> None:
        await self._connection.execute(FILL_TENANT, self._tenant, CONTENT, self.written, events, Nothing().backend_id)
        self.written += events

    async def keep_on(self, rate: float, quiet: asyncio.Task[Any]) -> None:
        """Write at this rate for as long as the quiet tenant does."""
        before, started = self.written, time.monotonic()
        while not quiet.done():
            if owed := int((time.monotonic() - started) * rate) - (self.written - before):
                await self.write(owed)
            await asyncio.sleep(_TICK)


async def capacity(server: EmbeddedPostgres, database: str, events: int) -> float:
    """Events a second, written and carried at the same time."""
    await emptied(server, database)
    async with AsyncExitStack() as opened:
        relay, noise = await _opened(opened, server, database, APART)
        await noise.write(1)
        await relay.go()
        await relay.warm()
        started = time.monotonic()
        while noise.written <= events:
            await noise.write(_CHUNK)
        noted = await relay.finish(noise.written)
    return (noise.written - 1) / (noted.when(noise.written) - started)


async def lags(server: EmbeddedPostgres, database: str, case: Case, events: int, gap: float) -> list[float]:
    """Milliseconds from commit to applied of the quiet tenant's events."""
    await emptied(server, database)
    async with AsyncExitStack() as opened:
        relay, noise = await _opened(opened, server, database, case.tenant)
        commit = await opened.enter_async_context(outbox_commit(server.dsn(database)))
        while noise.written < case.backlog:
            await noise.write(min(_CHUNK * _CHUNK, case.backlog - noise.written))
        await commit(WARM)
        await relay.go()
        await relay.warm()
        quiet = asyncio.create_task(paced(commit, events, gap))
        await noise.keep_on(case.rate, quiet)
        noted = await relay.finish(1 + events + noise.written)
    until = noted.when(case.backlog) if case.backlog else float("inf")
    counted = [(name, sent) for name, sent in (await quiet).items() if sent.committing < until]
    return [(noted.applied[name] - sent.committing) * 1000 for name, sent in counted[len(counted) // 10 :]]


async def _opened(
    opened: AsyncExitStack, server: EmbeddedPostgres, database: str, tenant: str
) -> tuple[RelayProcess, Noise]:
    asked = Asked(server.dsn(database), noise="noise-")
    relay = await opened.enter_async_context(relay_process(asked))
    connection = await asyncpg.connect(server.dsn(database, driver="postgresql"))
    opened.push_async_callback(connection.close)
    return relay, Noise(connection, tenant)


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0, seconds: float = 8) -> AsyncIterator[Row]:
    """Yield the quiet tenant's lag beside noise, beside a backlog too, and in the noisy one's lane, against alone."""
    async with outbox_database(server) as name:
        most, backlog = max(2_000, int(CAPACITY_EVENTS * scale)), max(2_000, int(BACKLOG * scale))
        capacities = [await capacity(server, name, most) for _ in range(CAPACITY_RUNS)]
        yield Row("written and carried at once, one tenant, events/s", capacities)
        rate = statistics.median(capacities) * SHARE
        cases = {
            f"beside {rate:,.0f} events/s": (Case(rate), GOAL),
            f"and {backlog:,} owed": (Case(rate, backlog), None),
            "beside as much in its own lane": (Case(rate, tenant=BESIDE), None),
        }
        gap = TIMES / rate
        events = max(20, int(max(2.0, seconds * scale) / gap))
        measured = [
            [await lags(server, name, case, events, gap) for case in (Case(), *(each for each, _ in cases.values()))]
            for _ in range(runs)
        ]
        for percent in (50, 99):
            alone, *others = zip(*([percentile(each, percent) for each in run] for run in measured), strict=True)
            yield Row(f"quiet tenant alone at {1 / gap:.0f}/s, p{percent} ms", alone)
            for (what, (_, goal)), found in zip(cases.items(), others, strict=True):
                ratios = [after / before for before, after in zip(alone, found, strict=True)]
                most_ratio = goal if percent == 99 else None
                medians = f"{statistics.median(found):.1f} ms"
                yield Row(f"  {what} ({medians}) / alone, p{percent}", ratios, most=most_ratio)


async def measure(server: EmbeddedPostgres, runs: int, seconds: float) -> None:
    async for row in rows(server, runs, seconds=seconds):
        print(row, flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--seconds", type=float, default=8)
    given = arguments.parse_args()
    with EmbeddedPostgres() as server:
        asyncio.run(measure(server, given.runs, given.seconds))


if __name__ == "__main__":
    main()
