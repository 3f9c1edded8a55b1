"""Relay throughput as a ratio to the floor: select for update skip locked, then delete, in one transaction.

    python -m benchmarks --only relay_throughput [--runs 5] [--scale 1.0]

Each pair of runs drains the same number of events of 500 bytes, with content in hand, by as many processes on either
side; `drained.py` says what the floor leaves out. Ratios are taken pair by pair.
"""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator
from typing import NamedTuple

from benchmarks.drained import Asked, drained, filled, floor_filled
from benchmarks.ground import Row, outbox_database
from outbox.testing.postgres import EmbeddedPostgres

EVENTS = 120_000
# At batch 10 everything is round trips: fewer events take as long.
EVENTS_SMALL = 30_000
BATCHES = (10, 100, 500, 1_000)
GOAL, GOAL_FROM_BATCH = 0.6, 100


class Cell(NamedTuple):
    """One line of the table. A curve is drawn through what differs in relays only."""

    batch: int
    relays: int
    tenants: int


CELLS = [
    *(Cell(batch, 1, tenants) for batch in BATCHES for tenants in (1, 100)),
    *(Cell(batch, relays, 100) for batch in BATCHES for relays in (2, 4)),
]


async def pair(dsn: str, events: int, cell: Cell) -> tuple[float, float]:
    """Return the rates of the floor and of the relay, drained one after the other."""
    await floor_filled(dsn, events)
    base = await drained(Asked(dsn, cell.batch, floor=True), cell.relays)
    await filled(dsn, events, tenants=cell.tenants)
    # Of several, none knows how much will be its own.
    most = events if cell.relays == 1 else None
    mine = await drained(Asked(dsn, cell.batch, most=most), cell.relays)
    assert base.deliveries == mine.deliveries == events, (base, mine)
    return base.rate, mine.rate


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0) -> AsyncIterator[Row]:
    """Yield a row for each batch size, number of relays and number of tenants."""
    async with outbox_database(server) as name:
        dsn = server.dsn(name, driver="postgresql")
        for cell in CELLS:
            events = max(8_000, int((EVENTS if cell.batch >= GOAL_FROM_BATCH else EVENTS_SMALL) * scale))
            pairs = [await pair(dsn, events, cell) for _ in range(runs)]
            base, mine = (statistics.median(side) for side in zip(*pairs, strict=True))
            relays = "1 relay" if cell.relays == 1 else f"{cell.relays} relays"
            tenants = "1 tenant" if cell.tenants == 1 else f"{cell.tenants} tenants"
            what = f"{relays} / floor, batch {cell.batch}, {tenants} ({mine:,.0f} / {base:,.0f} events/s)"
            goal = GOAL if cell.batch >= GOAL_FROM_BATCH else None
            yield Row(what, [ours / floor for floor, ours in pairs], least=goal)
            if cell.tenants > 1 and cell.batch in (100, 1_000):
                rates = [ours for _, ours in pairs]
                curve = f"relays:batch {cell.batch}"
                yield Row(f"  events/s, {relays}, batch {cell.batch}", rates, curve=curve, x=cell.relays)
