"""Ours beside what else Python has on PostgreSQL: recording, relaying and latency, on one server in one run.

    python -m benchmarks --only peers [--runs 5]

PgQueuer, awa-pg, faststream-outbox and Procrastinate with the best settings that were found, each in processes of its
own, on an empty database, with bodies of 500 bytes that are decoded and handed to a function that does nothing. All
take turns within a run, and ours is compared with the best of them in that run. Latency goes from the call that records
to the body in hand. Ours also carries what none of them has: a version, order by key, a record of every attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import asyncpg

from benchmarks.ground import Row, percentile
from benchmarks.peers.process import PEERS, Asked, Missing, asked_for, running
from outbox.testing.postgres import EmbeddedPostgres

OURS, OURS_THREE = "outbox", "outbox-three"
RATE = 200
SECONDS = 3.0
PACED_SECONDS = 6.0
GOAL_RELAY, GOAL_BULK, GOAL_LATENCY = 3.0, 1.0, 1.0
# What each drains per run: a few seconds' worth.
DRAINED = {"procrastinate": 3_000, OURS: 60_000}
_DRAINED = 20_000
_SETTLE = 2.0
DATABASE = "bench_peers"


class Figures(NamedTuple):
    """One run of one system: per second, and milliseconds."""

    single: float
    bulk: float
    relay: float
    p50: float
    p99: float


# What is said of it, the unit, which of ours counts against the best of the peers, and the bound of that ratio.
COMPARED: list[tuple[str, str, str, str, float | None, float | None]] = [
    ("relay", "relay", "deliveries/s", OURS, GOAL_RELAY, None),
    ("relay", "relay", "deliveries/s", OURS_THREE, None, None),
    ("record 1,000 at once", "bulk", "events/s", OURS, None, None),
    ("record 1,000 at once", "bulk", "events/s", OURS_THREE, GOAL_BULK, None),
    ("record one", "single", "events/s", OURS, None, None),
    ("record one", "single", "events/s", OURS_THREE, None, None),
    (f"latency at {RATE}/s, p50", "p50", "ms", OURS, None, GOAL_LATENCY),
    (f"latency at {RATE}/s, p99", "p99", "ms", OURS, None, GOAL_LATENCY),
]


@asynccontextmanager
async def empty_database(server: EmbeddedPostgres) -> AsyncIterator[str]:
    """Yield the address of a database with nothing in it."""
    admin = await asyncpg.connect(server.dsn("postgres", driver="postgresql"))
    await admin.execute(f"drop database if exists {DATABASE} with (force)")
    await admin.execute(f"create database {DATABASE}")
    try:
        yield server.dsn(DATABASE, driver="postgresql")
    finally:
        await admin.execute(f"drop database if exists {DATABASE} with (force)")
        await admin.close()


async def recorded(server: EmbeddedPostgres, peer: str, seconds: float) -> tuple[float, float]:
    """Record one at a time, then a thousand at a time; return how many per second."""
    async with empty_database(server) as dsn:
        await asked_for(Asked(peer, dsn, "prepare"))
        single = await asked_for(Asked(peer, dsn, "single", seconds=seconds))
        bulk = await asked_for(Asked(peer, dsn, "bulk", seconds=seconds))
    return single.rate, bulk.rate


async def relayed(server: EmbeddedPostgres, peer: str, events: int) -> float:
    """Drain what was recorded before; return how many deliveries per second."""
    async with empty_database(server) as dsn:
        await asked_for(Asked(peer, dsn, "prepare", events=events))
        await _checkpoint(dsn)
        return (await asked_for(Asked(peer, dsn, "relay", events=events))).rate


async def late(server: EmbeddedPostgres, peer: str, events: int) -> list[float]:
    """Record at a steady pace beside a relay; return the milliseconds of all but the first tenth."""
    async with empty_database(server) as dsn:
        await asked_for(Asked(peer, dsn, "prepare"))
        await _checkpoint(dsn)
        async with running(Asked(peer, dsn, "relay", events=events, quick=True)) as relay:
            await relay.go()
            # None of them says when it listens.
            await asyncio.sleep(_SETTLE)
            await asked_for(Asked(peer, dsn, "paced", events=events, rate=RATE, quick=True))
            lags = (await relay.finish()).lags
    return lags[len(lags) // 10 :]


async def measured(server: EmbeddedPostgres, peer: str, scale: float) -> Figures:
    """Measure one system once. Raises `Missing`."""
    single, bulk = await recorded(server, peer, max(0.5, SECONDS * scale))
    relay = await relayed(server, peer, max(1_000, int(DRAINED.get(peer, _DRAINED) * scale)))
    lags = await late(server, peer, max(100, int(RATE * PACED_SECONDS * scale)))
    return Figures(single, bulk, relay, percentile(lags, 50), percentile(lags, 99))


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0) -> AsyncIterator[Row]:
    """Yield every system's figures, and ours against the best of the others, run by run."""
    found: dict[str, list[Figures]] = {peer: [] for peer in PEERS}
    missing: dict[str, str] = {}
    for run in range(runs):
        # Who comes first changes, as a disk's cache and a machine's mood do.
        for peer in _turned(list(PEERS), run):
            try:
                found[peer].append(await measured(server, peer, scale))
            except Missing as error:
                missing[peer] = str(error)
    for peer, why in missing.items():
        # Whoever is ahead of the rest is not yet ahead of this one.
        yield Row(f"{title(peer)}: not measured: {why}"[:100], [], least=1)
        del found[peer]
    for row in _figures(found):
        yield row
    for row in _against_best(found):
        yield row


def _figures(found: dict[str, list[Figures]]) -> list[Row]:
    whats = dict.fromkeys((what, field, unit) for what, field, unit, *_ in COMPARED)
    return [
        Row(f"{title(peer)}: {what}, {unit}", [getattr(each, field) for each in figures])
        for what, field, unit in whats
        for peer, figures in found.items()
    ]


def _against_best(found: dict[str, list[Figures]]) -> list[Row]:
    rows = []
    peers = [peer for peer in found if peer not in (OURS, OURS_THREE)]
    for what, field, unit, mine, least, most in COMPARED:
        best_of: Callable[..., float] = min if unit == "ms" else max
        runs = zip(found[mine], *(found[peer] for peer in peers), strict=True)
        ratios = [getattr(own, field) / best_of(getattr(other, field) for other in others) for own, *others in runs]
        rows.append(Row(f"{title(mine)} / best peer: {what}", ratios, least=least, most=most))
    return rows


def title(peer: str) -> str:
    """Return its name, with the version that is installed."""
    if peer in (OURS, OURS_THREE):
        return "ours, three secondaries" if peer == OURS_THREE else "ours, one secondary"
    distribution = {"awa": "awa-pg", "faststream": "faststream-outbox"}.get(peer, peer)
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return distribution


def _turned(names: list[str], turn: int) -> list[str]:
    first = turn % len(names)
    return names[first:] + names[:first]


async def _checkpoint(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute("checkpoint")
    await connection.close()
