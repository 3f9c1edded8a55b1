"""What a command reaches it lets go of, in the right order."""

from __future__ import annotations

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import SyncManager
from outbox.reach import using
from tests.relaying import manager_of
from tests.scripted import ScriptedSecondary


async def test_a_manager_is_closed_before_the_pool_that_it_may_still_use(
    primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that comes back into a pool that was emptied already is left to the collector."""
    closed: list[str] = []
    closing, emptying = SyncManager.aclose, AsyncEngine.dispose

    async def close(manager: SyncManager) -> None:
        closed.append("manager")
        await closing(manager)

    async def empty(engine: AsyncEngine, close: bool = True) -> None:
        closed.append("pool")
        await emptying(engine, close)

    monkeypatch.setattr(SyncManager, "aclose", close)
    monkeypatch.setattr(AsyncEngine, "dispose", empty)
    manager = manager_of(primary, ScriptedSecondary("search"))
    async with using(manager):
        assert closed == []
    assert closed == ["manager", "pool"]
