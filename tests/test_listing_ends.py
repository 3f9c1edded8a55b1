"""Whoever leaves a listing early leaves no connection behind: it may be given back after its pool is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox import MemorySecondary, SyncManager, source
from outbox.secondaries.base import ResourceDigest
from tests.relaying import manager_of


class Base(DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "thing"
    name: Mapped[str] = mapped_column(primary_key=True)


class Endless(MemorySecondary):
    """Its listing goes on for ever."""

    summarise = None  # type: ignore[assignment]

    def __init__(self, backend_id: str) -> None:
        super().__init__(backend_id)
        self.listing = asyncio.Event()

    async def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> AsyncIterator[ResourceDigest]:
        self.listing.set()
        await asyncio.Event().wait()
        yield ResourceDigest("", 0, "")


async def listed(primary: AsyncEngine, secondary: MemorySecondary, monkeypatch: pytest.MonkeyPatch) -> SyncManager:
    """A class whose keys sort by no bytes, so that a cursor lists them."""
    monkeypatch.setattr(source, "_PAGE", 7)
    async with primary.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(text('alter table thing alter column name type text collate "C.utf8"'))
        await connection.execute(text("insert into thing select n::text from generate_series(1, 100) as n"))
    manager = manager_of(primary, secondary)
    manager.track(Thing, resource_type="Thing", tenant="acme", resource_id=Thing.name, content=lambda row: row.name)
    await manager.register()
    return manager


def lent(primary: AsyncEngine) -> int:
    lent: int = primary.pool.checkedout()  # type: ignore[attr-defined]
    return lent


async def test_a_listing_that_ends_at_a_bound(primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = await listed(primary, MemorySecondary("mirror"), monkeypatch)
    pages = source.Source(primary, manager.tracking).pages("acme", "Thing", None, "3")
    assert [row.resource_id async for page in pages for row in page][:3] == ["1", "10", "100"]
    assert lent(primary) == 0


async def test_a_comparison_that_is_cancelled(primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    secondary = Endless("mirror")
    manager = await listed(primary, secondary, monkeypatch)
    comparing = asyncio.create_task(manager.reconcile("mirror"))
    await secondary.listing.wait()
    assert lent(primary) == 1, "the cursor's"
    comparing.cancel()
    await asyncio.wait([comparing])
    assert lent(primary) == 0
