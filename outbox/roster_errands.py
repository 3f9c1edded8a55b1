"""Roster errands: what the commands about coming and going secondaries have done. Every connection is closed after."""

from __future__ import annotations

from outbox.manager import SyncManager
from outbox.reach import using
from outbox.retire import Removal
from outbox.roster import Addition, Tell

__all__ = ["add", "drain", "promote", "rebuild", "remove"]


async def add(manager: SyncManager, backend: str, tell: Tell) -> Addition:
    """Bring a secondary to equal the primary and make it live. Raises `SchemaMissing` and what `add` raises."""
    async with using(manager):
        return await manager.add(backend, tell=tell)


async def rebuild(manager: SyncManager, backend: str, tell: Tell) -> Addition:
    """Fill a secondary anew beside what it holds, and switch. Raises `SchemaMissing` and what `rebuild` raises."""
    async with using(manager):
        return await manager.rebuild(backend, tell=tell)


async def promote(manager: SyncManager, backend: str) -> None:
    """Make a shadow live. Raises `SchemaMissing` and `UnknownSecondary`."""
    async with using(manager):
        await manager.promote(backend)


async def drain(manager: SyncManager, backend: str, tell: Tell, *, wait: bool) -> int:
    """Let nothing new be owed to a secondary and wait for the rest; return how many keys are dead."""
    async with using(manager):
        await manager.drain(backend)
        tell(f"{backend} is draining: nothing new is owed to it, and relays carry the rest")
        return await manager.drained(backend, tell=tell) if wait else 0


async def remove(manager: SyncManager, backend: str, reason: str | None, *, discard: bool, dry_run: bool) -> Removal:
    """Remove a secondary, or tell what it is owed. Raises `SchemaMissing`, `StillOwed` and `UnknownSecondary`."""
    async with using(manager):
        if reason is None:
            return await manager.remove(backend, discard=discard, dry_run=dry_run)
        return await manager.remove(backend, discard=discard, reason=reason, dry_run=dry_run)
