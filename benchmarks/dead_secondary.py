"""What a dead secondary costs the healthy one beside it, in lag.

    python -m benchmarks.dead_secondary [--runs 5] [--seconds 8]

A relay in another process carries everything to two secondaries while events are committed one by one at 100 a second.
In turns the other secondary takes everything, and refuses every call. The healthy one's lag goes from right before
COMMIT to applied; with the other dead it is compared with the turn right before, at the same rate.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.clocked import OTHER, WARM, Asked, relay_process
from benchmarks.ground import Nothing, Row, outbox_database, percentile
from benchmarks.latency import outbox_commit, paced
from outbox import SyncManager
from outbox.testing.postgres import EmbeddedPostgres

GAP = 1 / 100
GOAL = 1.1


async def lags(server: EmbeddedPostgres, events: int, *, dead: bool) -> list[float]:
    """Milliseconds from commit to applied of the healthy secondary's events; the first tenth warms up."""
    async with AsyncExitStack() as opened:
        # What a dead one leaves behind, in its breaker and in what it is owed, is gone with the database.
        url = server.dsn(await opened.enter_async_context(outbox_database(server)))
        engine = create_async_engine(url)
        await SyncManager(engine, [Nothing(), Nothing(OTHER)]).register()
        await engine.dispose()
        relay = await opened.enter_async_context(relay_process(Asked(url, other="dead" if dead else "well")))
        commit = await opened.enter_async_context(outbox_commit(url))
        await commit(WARM)
        await relay.go()
        await relay.warm()
        committed = await paced(commit, events, GAP)
        noted = await relay.finish(1 + events)
    counted = list(committed.items())[events // 10 :]
    return [(noted.applied[name] - sent.committing) * 1000 for name, sent in counted]


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0, seconds: float = 8) -> AsyncIterator[Row]:
    """Yield the healthy one's lag beside one that is well, and what a dead one makes of it."""
    events = max(50, int(seconds * scale / GAP))
    measured = [[await lags(server, events, dead=dead) for dead in (False, True)] for _ in range(runs)]
    for percent, most in ((50, None), (99, GOAL)):
        well, dead = zip(*([percentile(each, percent) for each in run] for run in measured), strict=True)
        yield Row(f"a healthy secondary's lag beside one that is well, p{percent} ms", well)
        ratios = [after / before for before, after in zip(well, dead, strict=True)]
        yield Row(f"  beside a dead one / beside one that is well, p{percent}", ratios, most=most)


async def measure(runs: int, seconds: float) -> None:
    with EmbeddedPostgres() as server:
        async for row in rows(server, runs, seconds=seconds):
            print(row, flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--seconds", type=float, default=8)
    given = arguments.parse_args()
    asyncio.run(measure(given.runs, given.seconds))


if __name__ == "__main__":
    main()
