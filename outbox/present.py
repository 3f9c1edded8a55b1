"""Present: what the primary holds of one resource now, as the tracked classes tell it."""

from __future__ import annotations

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from outbox.capture import Tracking
from outbox.content import content_digest
from outbox.event import Operation
from outbox.listing import identified, of_tenant

__all__ = ["InPrimary", "in_primary"]

_PAGE = 500


class InPrimary(msgspec.Struct, frozen=True):
    """One resource as the primary holds it; where its type is not `tracked`, nobody can tell and the rest is empty."""

    tracked: bool
    present: bool = False
    version: str | None = None
    digest: str | None = None


async def in_primary(
    session: AsyncSession, tracking: Tracking, tenant_id: str, resource_type: str, resource_id: str
) -> InPrimary:
    """Return what the session's transaction sees of one resource; locks nothing.

    A class whose `resource_id` is a function is read as a whole: nothing else can find one of its resources.
    """
    tracked = next((each for each in tracking if each.resource_type == resource_type), None)
    if tracked is None:
        return InPrimary(tracked=False)
    statement = of_tenant(select(tracked.entity), tracked, tenant_id)
    if (condition := identified(tracked, [resource_id])) is not None:
        statement = statement.where(condition)
    found = InPrimary(tracked=True)
    async for row in await session.stream_scalars(statement.execution_options(yield_per=_PAGE)):
        if tracked.key_of(row) == (tenant_id, resource_id) and tracking.of(type(row)) is tracked:
            event = tracked.event(Operation.UPDATE, row)
            assert event.content is not None, "an update has its content"
            found = InPrimary(True, True, event.version, content_digest(event.content))
    return found
