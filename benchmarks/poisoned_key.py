"""What a hundred thousand blocked events of one poisoned key cost all other keys, in `log` order.

    python -m benchmarks --only poisoned_key [--runs 5] [--scale 1.0]

The key's first event fails again and again while the others are carried, so its hold keeps all later ones back, in
order. It is compared with the same events carried where nothing is held.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any

import asyncpg
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.drained import Marks
from benchmarks.ground import CONTENT, Nothing, Row, fill, outbox_database
from outbox import Applied, Outcome, Registration, Retry, SyncConfig, SyncEvent, SyncManager
from outbox.testing.postgres import EmbeddedPostgres

EVENTS = 60_000
BLOCKED = 100_000
POISONED = "poisoned"
GOAL = 0.9
CONFIG = SyncConfig(batch_size=100, doorbell=False, retry_max=timedelta(seconds=1), max_attempts=1_000_000)
# In a lane with nobody's other events it would be passed by for another reason than being held.
TENANT = "tenant-1"
POISON = """
with event as (
    insert into outbox (tenant_id, resource_type, resource_id, operation, content)
    select $1, 'Observation', $2, 'update', $3::json from generate_series(1, $4::int)
    returning event_id
)
insert into outbox_delivery (backend_id, lane, event_id, key_hash)
select 'nothing', (hashtextextended($1, 0) & 63)::smallint, event_id,
       hashtextextended($1 || '/Observation/' || $2, 0)
from event
"""
OWED = "select exists (select from outbox_delivery)"
_LOOK = 0.005
_PATIENCE = 600.0


class Poisoned(Nothing):
    """A secondary that never takes one key, and notes when it was handed the others."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = 0
        self.marks = Marks([], [])

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        refused = sum(event.resource_id == POISONED for event in batch)
        self.refused += refused
        if refused < len(batch):
            self.marks.add(len(batch) - refused)
        return [Retry("poisoned") if event.resource_id == POISONED else Applied() for event in batch]


async def rate(server: EmbeddedPostgres, database: str, events: int, blocked: int) -> float:
    """Carry the others with so many events of the poisoned key held; return how many per second."""
    connection = await asyncpg.connect(server.dsn(database, driver="postgresql"))
    await connection.execute("truncate outbox, outbox_delivery, outbox_attempt, outbox_hold")
    engine, secondary = create_async_engine(server.dsn(database)), Poisoned()
    manager = SyncManager(engine, [Registration(secondary, ordering="log")], config=CONFIG)
    await manager.register()
    if blocked:
        await connection.execute(POISON, TENANT, POISONED, CONTENT, blocked)
        await _carried(manager, connection, 0, secondary)
        assert secondary.refused
    await fill(connection, events)
    await connection.execute("vacuum analyze outbox, outbox_delivery, outbox_hold")
    await connection.execute("checkpoint")
    await _carried(manager, connection, events, secondary)
    await connection.close()
    await engine.dispose()
    times, sizes = secondary.marks.times, secondary.marks.sizes
    return sum(sizes[1:]) / (times[-1] - times[0])


async def _carried(manager: SyncManager, connection: asyncpg.Connection[Any], events: int, at: Poisoned) -> None:
    """Run a relay until nothing but what is held is owed and these events were handed over."""
    relay, deadline = manager.relay(), time.monotonic() + _PATIENCE
    running = asyncio.create_task(relay.run())
    while at.marks.total < events or (not events and await connection.fetchval(OWED)):
        assert time.monotonic() < deadline, "the others were not carried"
        await asyncio.sleep(_LOOK if events else _LOOK * 40)
    relay.stop()
    await running


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0) -> AsyncIterator[Row]:
    """Yield the rate of the others beside the blocked events as a ratio to the rate without."""
    events, blocked = max(2_000, int(EVENTS * scale)), max(1_000, int(BLOCKED * scale))
    async with outbox_database(server) as name:
        pairs = [(await rate(server, name, events, 0), await rate(server, name, events, blocked)) for _ in range(runs)]
        ratios = [beside / alone for alone, beside in pairs]
        yield Row(f"others beside {blocked:,} blocked events of a key / alone, log order", ratios, least=GOAL)
        yield Row("  events/s beside them", [beside for _, beside in pairs])
