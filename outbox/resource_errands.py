"""Resource errands: what the commands about one resource have done. Every connection is closed after."""

from __future__ import annotations

from datetime import timedelta

from outbox.find import Asked
from outbox.forget import Evidence
from outbox.manager import SyncManager
from outbox.reach import Unreached, using
from outbox.story import Story

__all__ = ["forget", "resource_of", "why"]


def resource_of(resource: str, tenant: str) -> Asked:
    """Return what `TYPE/ID` names; an id may hold slashes. Raises `Unreached`."""
    kind, slash, name = resource.partition("/")
    if not kind or not slash or not name:
        raise Unreached(f"{resource}: must be TYPE/ID, such as Patient/123")
    return Asked(tenant, kind, name)


async def why(manager: SyncManager, asked: Asked) -> Story:
    """Tell the story of a resource. Raises `SchemaMissing`."""
    async with using(manager):
        return await manager.why(asked.resource_type, asked.resource_id, asked.tenant_id)


async def forget(
    manager: SyncManager, asked: Asked, reason: str | None, timeout: timedelta, *, dry_run: bool
) -> Evidence:
    """Erase a resource, or only look what there is. Raises `SchemaMissing` and `NotForgotten`."""
    async with using(manager):
        return await manager.forget(
            asked.resource_type, asked.resource_id, asked.tenant_id, reason=reason, dry_run=dry_run, timeout=timeout
        )
