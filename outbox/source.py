"""Source: the primary's side of a comparison, read from the tracked classes in key order, in bounded pages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import msgspec
from sqlalchemy import Select, Text, cast, inspect, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from outbox.capture import Tracked, Tracking
from outbox.content import content_digest
from outbox.event import Operation, SyncEvent

__all__ = ["PrimaryDigest", "Source"]

_PAGE = 500


class PrimaryDigest(msgspec.Struct, frozen=True):
    """One resource as the primary holds it now."""

    resource_id: str
    digest: str


class Source:
    """Reads tracked classes. A scope whose `resource_id` is a function and not a column is sorted in memory."""

    def __init__(self, engine: AsyncEngine, tracking: Tracking) -> None:
        self._engine = engine
        self._tracking = tracking

    async def scopes(self, tenant_id: str | None, resource_type: str | None) -> list[tuple[str, str]]:
        """Return every (tenant_id, resource_type) there is to compare, narrowed by what is given."""
        found: set[tuple[str, str]] = set()
        for tracked in self._of(resource_type):
            tenants = {tenant_id} if tenant_id else await self._tenants(tracked)
            found |= {(tenant, tracked.resource_type) for tenant in tenants}
        return sorted(found)

    async def scan(self, tenant_id: str, resource_type: str) -> AsyncIterator[PrimaryDigest]:
        """Yield every resource of a scope, ordered by the UTF-8 bytes of its id."""
        for tracked in self._of(resource_type):
            if tracked.resource_id_column is None:
                rows = sorted([row async for row in self._everything(tracked, tenant_id)], key=_bytes_of)
                for row in rows:
                    yield row
                return
            async for row in self._ordered(tracked, tenant_id):
                yield row

    async def current(
        self, session: AsyncSession, tenant_id: str, resource_type: str, resource_ids: Sequence[str]
    ) -> dict[str, SyncEvent]:
        """Return the primary's state of some resources as update events; their rows stay locked by the transaction."""
        found: dict[str, SyncEvent] = {}
        for tracked in self._of(resource_type):
            statement = _of_tenant(select(tracked.entity), tracked, tenant_id).with_for_update()
            if tracked.resource_id_column is not None:
                statement = statement.where(cast(tracked.resource_id_column, Text).in_(resource_ids))
            async for row in await session.stream_scalars(statement.execution_options(yield_per=_PAGE)):
                event = tracked.event(Operation.UPDATE, row)
                if event.resource_id in resource_ids and event.tenant_id == tenant_id:
                    found[event.resource_id] = event
        return found

    def _of(self, resource_type: str | None) -> Iterator[Tracked]:
        return (each for each in self._tracking if resource_type in (None, each.resource_type))

    async def _tenants(self, tracked: Tracked) -> set[str]:
        column = tracked.tenant_column
        if isinstance(column, str):
            return {column}
        async with AsyncSession(self._engine) as session:
            if column is not None:
                return {str(tenant) for tenant in await session.scalars(select(column).distinct())}
            rows = await session.stream_scalars(select(tracked.entity).execution_options(yield_per=_PAGE))
            return {tracked.tenant(row) async for row in rows}

    async def _ordered(self, tracked: Tracked, tenant_id: str) -> AsyncIterator[PrimaryDigest]:
        # Bytewise, whatever collation the column has: both sides must sort alike.
        key = cast(tracked.resource_id_column, Text).collate("C")
        after: str | None = None
        while True:
            statement = _of_tenant(select(tracked.entity), tracked, tenant_id).order_by(key).limit(_PAGE)
            async with AsyncSession(self._engine) as session:
                rows = list(await session.scalars(statement if after is None else statement.where(key > after)))
                page = [digest for row in rows if (digest := _digest(tracked, tenant_id, row))]
            for each in page:
                yield each
            if len(rows) < _PAGE:
                return
            after = tracked.resource_id(rows[-1])

    async def _everything(self, tracked: Tracked, tenant_id: str) -> AsyncIterator[PrimaryDigest]:
        statement = _of_tenant(select(tracked.entity), tracked, tenant_id).order_by(
            *inspect(tracked.entity).primary_key
        )
        async with AsyncSession(self._engine) as session:
            async for row in await session.stream_scalars(statement.execution_options(yield_per=_PAGE)):
                if digest := _digest(tracked, tenant_id, row):
                    yield digest


def _of_tenant(statement: Select[Any], tracked: Tracked, tenant_id: str) -> Select[Any]:
    column = tracked.tenant_column
    return statement if column is None or isinstance(column, str) else statement.where(column == tenant_id)


def _digest(tracked: Tracked, tenant_id: str, row: Any) -> PrimaryDigest | None:
    event = tracked.event(Operation.UPDATE, row)
    if event.tenant_id != tenant_id:
        return None
    assert event.content is not None
    return PrimaryDigest(event.resource_id, content_digest(event.content))


def _bytes_of(row: PrimaryDigest) -> bytes:
    return row.resource_id.encode()
