"""Repair: append the events that restore one secondary, and nothing else.

What is there is recorded anew from the primary's row, read under lock in the same transaction, so its position is in
commit order with every other event of the key. What is there no more needs an order too: its delete draws a position
first, then everybody who may have drawn a lower one and not committed yet is waited for, then the primary is read once
more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from datetime import timedelta

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from outbox.event import SyncEvent
from outbox.headers import headers
from outbox.record import record
from outbox.source import Source
from outbox.statement import Statement
from outbox.writers import writers_ended

__all__ = ["ALONE", "Repairer"]

# Two that remove would each be a writer the other waits for.
ALONE = Statement("select pg_advisory_xact_lock(hashtextextended('{schema}.outbox repair', 0))")

_PAGE = 200
_TRIES = 5
_PAUSE = 0.05


class Repairer:
    """Records what restores one secondary. `actor` and `reason` go into the headers of its events.

    `uncarried` says how many resources it left as they are because no event can carry them exactly.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        schema: str,
        source: Source,
        backend_id: str,
        *,
        actor: str,
        reason: str,
        patience: timedelta,
    ) -> None:
        self.uncarried = 0
        self._engine = engine
        self._schema = schema
        self._source = source
        self._backend_id = backend_id
        self._actor = actor
        self._reason = reason
        self._patience = patience.total_seconds()

    async def restore(self, tenant_id: str, resource_type: str, names: Sequence[str]) -> int:
        """Record the primary's state of resources; return of how many. Who is gone by now has an event of its own."""
        done = 0
        for start in range(0, len(names), _PAGE):
            left = list(names[start : start + _PAGE])
            for attempt in range(_TRIES):
                # Rows that somebody has locked are passed by: he may record an event of his own, or change nothing.
                await asyncio.sleep(attempt * _PAUSE)
                met, recorded = await self._restore(tenant_id, resource_type, left)
                done += recorded
                left = [name for name in left if name not in met]
                if not left or not await self._source.find(tenant_id, resource_type, left):
                    break
        return done

    async def remove(self, tenant_id: str, resource_type: str, names: Sequence[str]) -> int:
        """Record deletes of what the primary does not have; return of how many it still did not have at the end."""
        deadline = time.monotonic() + self._patience
        deletes = self._carried([self._source.delete(tenant_id, resource_type, name) for name in names])
        pages = (deletes[start : start + _PAGE] for start in range(0, len(deletes), _PAGE))
        return sum([await self._remove(tenant_id, resource_type, page, deadline) for page in pages])

    async def _restore(self, tenant_id: str, resource_type: str, names: Sequence[str]) -> tuple[set[str], int]:
        """Record what can be; return whom that was about, those that no event can carry too, and how many it did."""
        async with AsyncSession(self._engine) as session, session.begin():
            found = await self._source.locked(session, tenant_id, resource_type, names)
            events = self._carried(found.values())
            await self._record(await session.connection(), events)
        return set(found), len(events)

    async def _remove(self, tenant_id: str, resource_type: str, deletes: list[SyncEvent], deadline: float) -> int:
        names = [each.resource_id for each in deletes]
        async with AsyncSession(self._engine) as session, session.begin() as transaction:
            connection = await session.connection()
            await connection.execute(text(ALONE.on(self._schema)))
            await self._record(connection, deletes)
            ended = await writers_ended(connection, self._schema, deadline)
            back = await self._source.find(tenant_id, resource_type, names) if ended else {}
            if ended and not back:
                return len(names)
            await transaction.rollback()
        gone = [each for each in deletes if each.resource_id not in back]
        return await self._remove(tenant_id, resource_type, gone, deadline) if ended and gone else 0

    def _carried(self, events: Collection[SyncEvent | None]) -> list[SyncEvent]:
        """Return the events that there are, and count those that nobody could make."""
        carried = [event for event in events if event is not None]
        self.uncarried += len(events) - len(carried)
        return carried

    async def _record(self, connection: AsyncConnection, events: list[SyncEvent]) -> None:
        if events:
            with headers({"repair": self._reason}, actor=self._actor):
                await record(connection, events, schema=self._schema, backend_ids=[self._backend_id])
