"""Backfill: record an event for every resource that the primary holds, owed to one secondary, while writes go on.

What each page does is in `filling`, what keeps it from crowding out live traffic in `restraint`. The cursor moves in
the transaction of the page, so a backfill that was killed goes on where it was, and two of them share the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from math import ceil
from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.capture import Tracking
from outbox.errors import SettingsError
from outbox.filling import Filler, Page, Refusal
from outbox.paging import Extent, extents
from outbox.restraint import Restraint
from outbox.settled import settled
from outbox.statement import Statement

__all__ = ["BEGIN", "MOST_OWED", "SHARE", "STATE", "Backfill", "BackfillProgress"]

# In one order, so that two who begin at once wait for each other and not in a circle.
BEGIN = Statement("""
insert into {schema}.outbox_backfill as known (backend_id, tenant_id, resource_type, total)
select cast(:backend_id as text), given.tenant_id, given.resource_type, given.total
from unnest(cast(:tenant_ids as text[]), cast(:resource_types as text[]), cast(:totals as bigint[]))
    as given (tenant_id, resource_type, total)
order by given.tenant_id, given.resource_type
on conflict (backend_id, tenant_id, resource_type) do update
set after = null, recorded = 0, refused = 0, total = excluded.total, started_at = clock_timestamp(),
    advanced_at = clock_timestamp(), finished_at = null
where cast(:restart as boolean)
""")

STATE = Statement("""
select tenant_id, resource_type, recorded, refused, total, finished_at is not null as finished
from {schema}.outbox_backfill
where backend_id = :backend_id
""")

MOST_OWED = 100
"""How many of a backfill's own deliveries may be on their way, unless said otherwise: a batch of a relay. With twice as
many it is a third faster, and live events beside it took more than twice as long as alone."""

SHARE = 0.5
"""How much of the time a backfill works, unless said otherwise: on a busy machine the rest is what live events need."""

_LARGEST_PAGE = 500
_MOST_REFUSALS = 10


class BackfillProgress(msgspec.Struct):
    """How far a backfill is, over all scopes it was asked for.

    `recorded` includes what earlier calls recorded; `total` is how many rows there were when each scope began, less
    what a finished one did not meet. `refused` counts rows that no event can carry exactly; up to ten that this call
    met are `refusals`. `per_second` is this call's rate. `waiting` says what for, if that takes a while.
    """

    backend_id: str
    recorded: int = 0
    total: int = 0
    refused: int = 0
    per_second: float = 0.0
    time_left: timedelta | None = None
    waiting: str | None = None
    finished: bool = False
    refusals: list[Refusal] = msgspec.field(default_factory=list)

    @property
    def left(self) -> int:
        """How many are left to record; an estimate, as writes go on."""
        return 0 if self.finished else max(0, self.total - self.recorded - self.refused)


class Backfill:
    """Fills one secondary from the tracked classes, page by page."""

    def __init__(
        self,
        engine: AsyncEngine,
        tracking: Tracking,
        schema: str,
        backend_id: str,
        *,
        rate: float | None = None,
        most_owed: int | None = MOST_OWED,
        share: float = SHARE,
        ring: Callable[[], None] = lambda: None,
        told: Callable[[BackfillProgress], None] = lambda _: None,
    ) -> None:
        if rate is not None and not rate > 0:
            raise SettingsError("rate", "must be above 0")
        if most_owed is not None and most_owed < 1:
            raise SettingsError("most_owed", "must be 1 or more, or None")
        if not 0 < share <= 1:
            raise SettingsError("share", "must be above 0, and 1 at most")
        self._engine = engine
        self._tracking = tracking
        self._schema = schema
        self._filler = Filler(engine, schema, backend_id)
        self._restraint = Restraint(engine, schema, backend_id, rate=rate, most_owed=most_owed, share=share)
        self._size = _page_size(rate, most_owed)
        self._ring = ring
        self._told = told
        self._progress = BackfillProgress(backend_id)
        self._started, self._before = 0.0, 0

    async def run(
        self, tenant_id: str | None = None, resource_type: str | None = None, *, restart: bool = False
    ) -> BackfillProgress:
        """Record what is left of every scope, or of those given; with `restart`, all of it anew."""
        await self._restraint.secondary()
        # Who recorded before this secondary was known recorded nothing for it, and his rows may yet become visible.
        await settled(self._engine, self._schema, self._waits_for)
        # Afterwards: a tenant that appears from now on is written with events that are owed to this secondary.
        found = await self._wanted(tenant_id, resource_type)
        await self._begin(found, restart=restart)
        unfinished = self._sum_up(found, await self._known())
        self._started, self._before = time.monotonic(), self._progress.recorded
        self._tell()
        for extent in unfinished:
            while not await self._page(extent):
                self._tell()
        # Another backfill may have recorded some of it, or may have begun anew.
        self._progress.finished = not self._sum_up(found, await self._known())
        self._tell()
        return self._progress

    async def plan(
        self, tenant_id: str | None = None, resource_type: str | None = None, *, restart: bool = False
    ) -> BackfillProgress:
        """Count what `run` would record, as `left`, and write nothing."""
        found = await self._wanted(tenant_id, resource_type)
        self._sum_up(found, {} if restart else await self._known())
        return self._progress

    async def _begin(self, found: list[Extent], *, restart: bool) -> None:
        """Write a cursor for each scope that has none; with `restart`, set all of them back."""
        parameters = {
            "tenant_ids": [each.tenant_id for each in found],
            "resource_types": [each.resource_type for each in found],
            "totals": [each.total for each in found],
            "restart": restart,
        }
        await self._filler.patiently(lambda session: self._filler.run(session, BEGIN, **parameters))

    async def _wanted(self, tenant_id: str | None, resource_type: str | None) -> list[Extent]:
        """Return what the secondary wants of the tracked classes, or of what is asked for."""
        secondary = await self._restraint.secondary()
        tenants, types = secondary.tenant_ids, secondary.resource_types
        asked = [each.resource_type for each in self._tracking if resource_type in (None, each.resource_type)]
        wanted = [name for name in asked if types is None or name in types]
        found = await extents(self._engine, self._tracking, wanted)
        return [
            each
            for each in found
            if tenant_id in (None, each.tenant_id) and (tenants is None or each.tenant_id in tenants)
        ]

    async def _known(self) -> dict[tuple[str, str], Any]:
        parameters = {"backend_id": self._progress.backend_id}
        async with self._engine.connect() as connection:
            rows = await connection.execute(text(STATE.on(self._schema)), parameters)
            return {(row.tenant_id, row.resource_type): row for row in rows}

    def _sum_up(self, found: list[Extent], known: dict[tuple[str, str], Any]) -> list[Extent]:
        """Say what the cursors say, and return whose scopes are not finished."""
        progress, unfinished = self._progress, []
        progress.recorded = progress.refused = progress.total = 0
        for extent in found:
            row = known.get((extent.tenant_id, extent.resource_type))
            done = row.recorded + row.refused if row else 0
            if row is not None:
                progress.recorded += row.recorded
                progress.refused += row.refused
            if row is None or not row.finished:
                unfinished.append(extent)
            progress.total += done if row and row.finished else max(done, (row and row.total) or extent.total)
        return unfinished

    async def _page(self, extent: Extent) -> bool:
        """Record the next page, whole; return whether the scope is finished."""
        await self._restraint.room(self._size, self._waits)
        started = time.monotonic()
        page = await self._filler.page(extent, self._size)
        took = time.monotonic() - started
        while page.missing:
            self._ring()
            self._waits("transactions that hold some of the page's rows")
            await self._filler.come_back(extent, page)
        self._note(page, took)
        return page.last

    def _note(self, page: Page, took: float) -> None:
        progress = self._progress
        progress.recorded += len(page.positions)
        progress.refused += len(page.refusals)
        progress.refusals += page.refusals[: _MOST_REFUSALS - len(progress.refusals)]
        self._restraint.note(page.positions, took)
        if page.positions:
            self._ring()

    def _waits(self, what: str) -> None:
        self._progress.waiting = what
        self._told(self._progress)

    def _waits_for(self, pids: list[int]) -> None:
        self._waits(f"transactions that are older than the backfill (processes {', '.join(map(str, pids))})")

    def _tell(self) -> None:
        progress, taken = self._progress, time.monotonic() - self._started
        progress.waiting = None
        progress.per_second = (progress.recorded - self._before) / taken if taken > 0 else 0.0
        progress.time_left = timedelta(seconds=progress.left / progress.per_second) if progress.per_second else None
        self._told(progress)


def _page_size(rate: float | None, most_owed: int | None) -> int:
    """Two pages are as much as may be owed, so that one is recorded while one is carried; and ten make a second."""
    limits = [_LARGEST_PAGE]
    if most_owed is not None:
        limits.append(ceil(most_owed / 2))
    if rate is not None:
        limits.append(ceil(rate / 10))
    return min(limits)
