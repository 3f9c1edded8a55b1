"""From commit to applied across processes by the rate of events, with the doorbell and by polling alone.

    python -m benchmarks --only latency_by_rate [--runs 5] [--scale 1.0]

As `latency`, at 1, 200 and 2,000 events per second. One writer cannot commit 2,000 times a second here, so eight share
them; the row says how many were really written.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import NamedTuple

from benchmarks.clocked import WARM, Asked, emptied, relay_process
from benchmarks.ground import Row, outbox_database, percentile
from benchmarks.latency import outbox_commit, paced
from outbox.testing.postgres import EmbeddedPostgres


class Pace(NamedTuple):
    """So many events per second in all, by so many writers, for so many events."""

    rate: int
    writers: int
    events: int


PACES = (Pace(1, 1, 20), Pace(200, 1, 1_200), Pace(2_000, 8, 8_000))


async def late(server: EmbeddedPostgres, database: str, asked: Asked, pace: Pace) -> tuple[list[float], float]:
    """Return milliseconds of all but the first tenth, and how many events per second were written."""
    await emptied(server, database)
    each = pace.events // pace.writers
    async with AsyncExitStack() as opened:
        relay = await opened.enter_async_context(relay_process(asked))
        lent = [outbox_commit(asked.url, doorbell=asked.doorbell) for _ in range(pace.writers)]
        commits = [await opened.enter_async_context(commit) for commit in lent]
        for number, commit in enumerate(commits):
            await commit(f"{WARM}-{number}")
        await relay.go()
        await relay.warm()
        gap = pace.writers / pace.rate
        writing = (paced(commit, each, gap, f"{number}-") for number, commit in enumerate(commits))
        sent = {name: at for found in await asyncio.gather(*writing) for name, at in found.items()}
        noted = await relay.finish(len(sent) + pace.writers)
    order = sorted(sent, key=lambda name: sent[name].committing)
    seconds = sent[order[-1]].committing - sent[order[0]].committing
    lags = [(noted.applied[name] - sent[name].committing) * 1000 for name in order[len(order) // 10 :]]
    return lags, (len(order) - 1) / seconds


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0) -> AsyncIterator[Row]:
    """Yield p50 and p99 at each rate, both ways."""
    async with outbox_database(server) as name:
        for pace in PACES:
            scaled = pace._replace(events=max(5 * pace.writers, int(pace.events * scale)))
            for doorbell in (True, False):
                asked = Asked(server.dsn(name), doorbell=doorbell)
                found = [await late(server, name, asked, scaled) for _ in range(runs)]
                written = sorted(rate for _, rate in found)[runs // 2]
                how = "doorbell" if doorbell else "polling alone"
                for percent in (50, 99):
                    values = [percentile(lags, percent) for lags, _ in found]
                    what = f"commit to applied at {pace.rate:,}/s ({written:,.0f} written), {how}, p{percent} ms"
                    yield Row(what, values, curve=f"rate:{how}, p{percent}", x=pace.rate)
