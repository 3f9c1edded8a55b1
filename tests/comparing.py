"""What the tests of reconcile and repair share: a small table, both sides of it, and places to get in between."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from sqlalchemy import Text, text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox import MemorySecondary, ReconciliationResult, Registration
from outbox.judge import Judge, Patience
from outbox.reconcile import SyncReconciler
from outbox.reconciliation import Terms
from outbox.repair import Repairer
from outbox.secondaries.base import ResourceDigest, Secondary
from outbox.source import Source
from tests.relaying import manager_of

NORTH = ("north", "Note")
Between = Callable[[], Awaitable[None]]


class Base(DeclarativeBase): ...


class Note(Base):
    """Its key sorts by bytes and its content is text, so the database itself can sum it up."""

    __tablename__ = "note"
    tenant_id: Mapped[str] = mapped_column(Text(collation="C"), primary_key=True)
    number: Mapped[str] = mapped_column(Text(collation="C"), primary_key=True)
    content: Mapped[str] = mapped_column(Text)


def said(word: str) -> str:
    """The content of a note."""
    return json.dumps({"word": word})


class Interrupted(MemorySecondary):
    """In memory; awaits `before_find` once, before it next answers a look at single resources."""

    before_find: Between | None = None

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> Sequence[ResourceDigest]:
        if (action := self.before_find) is not None:
            self.before_find = None
            await action()
        return await super().find(tenant_id, resource_type, resource_ids)


class World:
    """A primary of notes, one secondary, a manager that knows both."""

    def __init__(
        self,
        engine: AsyncEngine,
        secondary: Secondary | Registration,
        *,
        summed: bool = True,
        resource_id: Any = Note.number,
        **settings: Any,
    ) -> None:
        self.engine = engine
        self.manager = manager_of(engine, secondary, **settings)
        self.backend_id = secondary.backend_id
        self.secondary: Any = secondary.secondary if isinstance(secondary, Registration) else secondary
        content: Any = Note.content if summed else lambda note: note.content
        self.manager.track(Note, tenant=Note.tenant_id, resource_id=resource_id, content=content)
        self.source = Source(engine, self.manager.tracking)

    async def open(self) -> World:
        async with self.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        await self.manager.register()
        return self

    async def write(self, names: Sequence[str], word: str = "first", tenant: str = "north") -> None:
        """Insert or update notes in one transaction."""
        async with self.manager.session() as session, session.begin():
            for name in names:
                await session.merge(Note(tenant_id=tenant, number=name, content=said(word)))

    async def remove(self, names: Sequence[str], tenant: str = "north") -> None:
        """Delete notes in one transaction."""
        async with self.manager.session() as session, session.begin():
            for name in names:
                await session.delete(await session.get_one(Note, (tenant, name)))

    async def relay(self) -> None:
        """Deliver all that is due."""
        await self.manager.relay().drain()

    async def reconcile(self, *scope: str, repair: bool = False, **terms: Any) -> ReconciliationResult:
        """Compare, with a source of this world's own."""
        given = Terms(**({"patience": timedelta(seconds=10)} | terms))
        reconciler = SyncReconciler(self.engine, self.source, self.secondary, "public", given)
        return await reconciler.reconcile(*scope, repair=repair)

    def judge(self, patience: float = 0) -> Judge:
        return Judge(self.engine, "public", self.source, self.secondary, Patience(timedelta(seconds=patience)))

    def repairer(self, patience: float = 10) -> Repairer:
        return Repairer(
            self.engine,
            "public",
            self.source,
            self.backend_id,
            actor="test",
            reason="it differed",
            patience=timedelta(seconds=patience),
        )

    @asynccontextmanager
    async def writing(self, *names: str, word: str = "late", tenant: str = "north") -> AsyncIterator[Any]:
        """A session that has written notes and its events, and not yet committed."""
        async with self.manager.session() as session:
            await session.begin()
            for name in names:
                await session.merge(Note(tenant_id=tenant, number=name, content=said(word)))
            await session.flush()
            yield session


async def otherwise_sorted(engine: AsyncEngine) -> None:
    """Give the ids of notes a collation that is not said to sort by bytes: what the server has of them."""
    chosen = """
    select collname from pg_collation
    where collname in ('und-x-icu', 'en_US.utf8', 'C.utf8', 'C.UTF-8') and collencoding in (-1, 6)
    order by collprovider = 'i' desc, collname = 'en_US.utf8' desc limit 1
    """
    async with engine.begin() as connection:
        collation = await connection.scalar(text(chosen))
        await connection.execute(text(f'alter table note alter column number type text collate "{collation}"'))
