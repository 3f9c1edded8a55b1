"""Restraint: what keeps a backfill behind live traffic."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.errors import UnknownSecondary
from outbox.statement import Statement

__all__ = ["OWED", "Restraint"]

# Of what we recorded, what is still to be done; a key that failed has gone to a hold and keeps nobody waiting. A relay
# takes holds before fresh deliveries, so a secondary that is down holds up what it was sent and is sent no more.
OWED = Statement("""
with in_hand as materialized (
    select unnest(attempt.event_ids) as event_id
    from {schema}.outbox_attempt as attempt
    where attempt.backend_id = :backend_id and attempt.finished_at is null
)
select secondary.status, secondary.tenant_ids, secondary.resource_types, array(
    select asked.event_id
    from unnest(cast(:event_ids as bigint[])) as asked (event_id)
    cross join lateral (
        select cast(hashtextextended(event.tenant_id, 0) & 63 as smallint) as lane
        from {schema}.outbox as event where event.event_id = asked.event_id
        offset 0
    ) as event
    where exists (
        select from {schema}.outbox_delivery as delivery
        where delivery.backend_id = :backend_id and delivery.lane = event.lane and delivery.event_id = asked.event_id
        offset 0
    ) or asked.event_id in (select event_id from in_hand)
) as owed
from {schema}.outbox_secondary as secondary
where secondary.backend_id = :backend_id
""")

_OWED_EVENTS = ("shadow", "live", "paused")
_SHORTEST, _LONGEST = 0.002, 0.1


class Restraint:
    """Lets a backfill go on when few of its own deliveries are on their way, at its rate, for its share of the time."""

    def __init__(
        self,
        engine: AsyncEngine,
        schema: str,
        backend_id: str,
        *,
        rate: float | None,
        most_owed: int | None,
        share: float,
    ) -> None:
        self._engine = engine
        self._schema = schema
        self._backend_id = backend_id
        self._rate = rate
        self._most_owed = most_owed
        self._share = share
        self._owed: list[int] = []
        self._due = 0.0

    async def secondary(self) -> Any:
        """Return what the registry says, and what of ours is still owed. Raises `UnknownSecondary`."""
        parameters = {"backend_id": self._backend_id, "event_ids": self._owed}
        async with self._engine.connect() as connection:
            row = (await connection.execute(text(OWED.on(self._schema)), parameters)).one_or_none()
        if row is None:
            raise UnknownSecondary(self._backend_id, "the registry does not have it; a relay or register() does that")
        if row.status not in _OWED_EVENTS:
            raise UnknownSecondary(self._backend_id, f"it is {row.status} and is owed nothing any more")
        return row

    def note(self, positions: Collection[int], took: float) -> None:
        """Remember what a page has recorded, and how many seconds of work it was."""
        self._owed += positions
        now = time.monotonic()
        if self._rate is not None:
            self._due = max(self._due, now) + len(positions) / self._rate
        self._due = max(self._due, now + took * (1 / self._share - 1))

    async def room(self, size: int, waits: Callable[[str], None]) -> None:
        """Return when a page of `size` may be recorded; `waits` hears what is waited for, if it takes a while."""
        if (early := self._due - time.monotonic()) > 0:
            await asyncio.sleep(early)
        pause = _SHORTEST
        while not await self._has_room(size):
            if pause == _LONGEST:
                waits("the secondary to take what it is owed")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST)

    async def _has_room(self, size: int) -> bool:
        if self._most_owed is None:
            return True
        row = await self.secondary()
        self._owed = list(row.owed)
        return len(self._owed) <= max(0, self._most_owed - size)
