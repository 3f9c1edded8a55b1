"""What the tests of backfill share: a tracked class, rows that were there before, and places to stop a page at.

As a program it is a backfill of one row a page that kills itself at a given statement of the second page.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.util import await_only

from outbox import MemorySecondary, Registration, SyncManager
from outbox.secondaries.base import Secondary
from tests.relaying import quick

ADVANCING = 'update "public".outbox_backfill'
RECORDING = "pg_current_xact_id"
STEPS = {
    "the page has begun": "lock_timeout",
    "the cursor is locked": "for update",
    "the keys are read": "FROM patient",
    "the rows are locked": "FOR SHARE",
    "the events are recorded": RECORDING,
    "the cursor has moved": ADVANCING,
    "the page is committed": "as asked (event_id)",
}
"""Words of the statement that a step is over with."""


class Base(DeclarativeBase): ...


class Patient(Base):
    __tablename__ = "patient"
    tenant_id: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    family: Mapped[str]


class Gate:
    """Holds up a page while its rows are locked and their events have no position yet."""

    def __init__(self) -> None:
        self.armed: set[int] = set()
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    def pass_by(self, patient: Patient) -> None:
        if patient.number in self.armed:
            self.armed.discard(patient.number)
            self.reached.set()
            await_only(self.opened.wait())


class World:
    """A primary with patients that nobody was told of, and a manager."""

    def __init__(self, engine: AsyncEngine, *secondaries: Secondary | Registration, **settings: Any) -> None:
        self.engine = engine
        self.gate = Gate()
        self.manager = SyncManager(engine, secondaries or [MemorySecondary("mirror")], config=quick(**settings))
        self.manager.track(Patient, tenant=Patient.tenant_id, content=self._content)

    def _content(self, patient: Patient) -> dict[str, Any]:
        self.gate.pass_by(patient)
        return {"number": patient.number, "family": patient.family}

    async def prepare(self, patients: int, tenant: str = "north") -> None:
        """Create the table and fill it past every session, and register the secondaries."""
        async with self.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        await self.fill(range(1, patients + 1), tenant)
        await self.manager.register()

    async def fill(self, numbers: Sequence[int], tenant: str = "north") -> None:
        """Insert rows with no event."""
        sql = "insert into patient select :tenant, number, 'Old' from unnest(cast(:numbers as int[])) as number"
        async with self.engine.begin() as connection:
            await connection.execute(text(sql), {"tenant": tenant, "numbers": list(numbers)})

    async def write(self, number: int, family: str, tenant: str = "north") -> None:
        async with self.manager.session() as session, session.begin():
            await session.merge(Patient(tenant_id=tenant, number=number, family=family))

    async def delete(self, number: int, tenant: str = "north") -> None:
        async with self.manager.session() as session, session.begin():
            patient = await session.get(Patient, (tenant, number), with_for_update=True)
            if patient is not None:
                await session.delete(patient)

    async def held(self) -> dict[tuple[str, str], str]:
        """What the primary holds: the family by tenant and id."""
        async with self.engine.connect() as connection:
            rows = await connection.execute(text("select tenant_id, number, family from patient"))
            return {(row[0], f"{row[0]}/{row[1]}"): row[2] for row in rows}


def families(secondary: MemorySecondary) -> dict[tuple[str, str], str]:
    """What a secondary holds, as `World.held` shows it."""
    live = [each for each in secondary.held.values() if each.content is not None]
    return {(each.tenant_id, each.resource_id): json.loads(each.content or "")["family"] for each in live}


def before_each_statement(engine: AsyncEngine, told: Any) -> Any:
    """Have `told` called with every statement's text before it is sent; return what undoes it."""

    def heard(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        told(statement)

    event.listen(engine.sync_engine, "before_cursor_execute", heard)
    return lambda: event.remove(engine.sync_engine, "before_cursor_execute", heard)


async def _be_killed(dsn: str, words: str) -> None:
    world = World(create_async_engine(dsn))
    pages = 0

    def heard(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal pages
        # Every page begins with its bounds.
        pages += "lock_timeout" in statement
        # One transaction before the pages writes the cursors.
        if pages == 3 and words in statement:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(world.engine.sync_engine, "after_cursor_execute", heard)
    await world.manager.backfill("mirror", most_owed=2)


if __name__ == "__main__":
    asyncio.run(_be_killed(*sys.argv[1:]))
