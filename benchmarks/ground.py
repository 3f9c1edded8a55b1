"""The ground all benchmarks stand on: one server with default durability, one filled outbox, medians of paired runs."""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
from sqlalchemy.ext.asyncio import create_async_engine

from outbox import SyncEvent
from outbox.migrate import migrate
from outbox.secondaries.base import Applied, Outcome, ResourceDigest
from outbox.testing.postgres import EmbeddedPostgres

CONTENT = '{"resourceType":"Observation","status":"final","note":"' + "x" * 440 + '"}'

FILL = """
with event as (
    insert into outbox (tenant_id, resource_type, resource_id, operation, content)
    select 'tenant-' || (n % $2), 'Observation', n::text, 'update', $3::json
    from generate_series($5::bigint, $5::bigint + $1::bigint - 1) as n
    returning event_id, tenant_id, resource_type, resource_id
)
insert into outbox_delivery (backend_id, lane, event_id, key_hash)
select backend_id, (hashtextextended(tenant_id, 0) & 63)::smallint, event_id,
       hashtextextended(tenant_id || '/' || resource_type || '/' || resource_id, 0)
from event cross join unnest($4::text[]) as secondary (backend_id)
"""
_CHUNK = 50_000


class Nothing:
    """A secondary that takes everything and keeps nothing; it looks at every content, so content is in hand."""

    def __init__(self, backend_id: str = "nothing") -> None:
        self.backend_id = backend_id
        self.seen = 0
        self.characters = 0

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        self.characters += sum(len(event.content or "") for event in batch)
        self.seen += len(batch)
        return [Applied()] * len(batch)

    async def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> AsyncIterator[ResourceDigest]:
        return
        yield


async def fill(
    connection: asyncpg.Connection[Any],
    events: int,
    *,
    tenants: int = 100,
    content: str = CONTENT,
    backend_ids: Sequence[str] = ("nothing",),
    start: int = 1,
) -> None:
    """Record events of as many keys, numbered from `start` on, owed to all of these secondaries."""
    for first in range(start, start + events, _CHUNK):
        size = min(_CHUNK, start + events - first)
        await connection.execute(FILL, size, tenants, content, list(backend_ids), first)


@asynccontextmanager
async def outbox_database(server: EmbeddedPostgres, name: str = "bench") -> AsyncIterator[str]:
    """A fresh database with the outbox tables; yields its name."""
    admin = await asyncpg.connect(server.dsn("postgres", driver="postgresql"))
    await admin.execute(f"drop database if exists {name} with (force)")
    await admin.execute(f"create database {name}")
    engine = create_async_engine(server.dsn(name))
    await migrate(engine)
    await engine.dispose()
    try:
        yield name
    finally:
        await admin.execute(f"drop database {name} with (force)")
        await admin.close()


def spread(values: Sequence[float]) -> str:
    """Median, and how far the runs were apart: the machine's noise."""
    if not values:
        return f"{'-':>10}"
    return f"{statistics.median(values):10.2f}  ({min(values):.2f} to {max(values):.2f})"


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that so many in a hundred do not exceed."""
    return sorted(values)[-(-len(values) * percent // 100) - 1]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: what was measured, once per run, and what it should be. Without a bound it informs.

    No values: it could not be measured, and the name says why. A row with a `curve` is also a point of a plot, at `x`.
    """

    name: str
    values: Sequence[float]
    least: float | None = None
    most: float | None = None
    curve: str | None = None
    x: float = 0

    @property
    def goal(self) -> str:
        if self.least is not None:
            return f">= {self.least:g}"
        return "-" if self.most is None else f"<= {self.most:g}"

    @property
    def verdict(self) -> str:
        if self.least is None and self.most is None:
            return ""
        if not self.values:
            return "missing"
        median = statistics.median(self.values)
        kept = median >= self.least if self.least is not None else median <= (self.most or 0)
        return "pass" if kept else "short"

    def __str__(self) -> str:
        return f"{self.name:<80} {self.goal:>8} {spread(self.values):<36} {self.verdict}"
