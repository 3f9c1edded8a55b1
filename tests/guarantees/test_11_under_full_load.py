"""Guarantee 11: while everything is written all the time, the one true drift is reported, and nothing else ever is."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import msgspec
import pytest
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm.exc import StaleDataError

from outbox import ReconciliationResult
from outbox.secondaries.base import Retry
from tests.comparing import Note, World, said
from tests.relaying import pending, rows, running
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

pytestmark = pytest.mark.long

SECONDS = float(os.environ.get("OUTBOX_TEST_RECONCILE_SECONDS", "20"))
TENANTS = ("north", "south")
BUSY = [f"busy-{number:02d}" for number in range(40)]
QUIET = [f"quiet-{number:03d}" for number in range(200)]
FORGED = "quiet-077"


class Writer:
    """Writes one busy note after the other, in every way there is, and often comes back to what it said."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.chance = random.Random(seed)
        self.written = 0

    async def run(self) -> None:
        ways = (self._set, self._away_and_back, self._away, self._there_and_back, self._rename)
        while True:
            tenant, name = self.chance.choice(TENANTS), self.chance.choice(BUSY)
            try:
                async with self.world.manager.session() as session:
                    await session.begin()
                    note = await session.get(Note, (tenant, name), with_for_update=True)
                    await self.chance.choice(ways)(session, note, Note(tenant_id=tenant, number=name))
                    # The pace of a caller who has something else to do before his commit; nothing depends on it.
                    await asyncio.sleep(self.chance.choice((0, 0, 0.002, 0.03)))
                    await (session.rollback() if self.chance.random() < 0.1 else session.commit())
            except (DBAPIError, StaleDataError):
                # Somebody was first, or two that rename wait for each other: nothing was committed.
                continue
            self.written += 1

    def _word(self) -> str:
        return said(self.chance.choice(("yes", "no")))

    async def _set(self, session, note, new) -> None:
        new.content = self._word()
        await session.merge(new)

    async def _away_and_back(self, session, note, new) -> None:
        new.content = self._word() if note is None else note.content
        if note is not None:
            await session.delete(note)
            await session.flush()
        session.add(new)

    async def _away(self, session, note, new) -> None:
        if note is not None:
            await session.delete(note)

    async def _there_and_back(self, session, note, new) -> None:
        """Change it and change it back, or add it and take it away, before anybody sees it."""
        if note is None:
            new.content = self._word()
            session.add(new)
            await session.flush()
            await session.delete(new)
        else:
            before, note.content = note.content, said("neither")
            await session.flush()
            note.content = before

    async def _rename(self, session, note, new) -> None:
        if note is not None:
            note.number = self.chance.choice(BUSY)


async def trouble(world: World, chance: random.Random) -> None:
    """Let keys fail for a while and come back, and the whole secondary pause."""
    while True:
        for name in chance.sample(BUSY, 3):
            world.secondary.script(name, *[Retry("busy")] * chance.randrange(1, 4))
        await asyncio.sleep(0.3)
        await world.manager.pause("mirror")
        await asyncio.sleep(0.1)
        await world.manager.resume("mirror")


@asynccontextmanager
async def load(world: World, writers: list[Writer]) -> AsyncIterator[None]:
    """Two relays, the writers, and trouble; all of them end, and what is owed is delivered, before this returns."""
    first, second = world.manager.relay(), world.manager.relay()
    async with running(first, second):
        tasks = [asyncio.create_task(writer.run()) for writer in writers]
        tasks.append(asyncio.create_task(trouble(world, random.Random(7))))
        try:
            yield
            assert not [task for task in tasks if task.done()], "somebody gave up, so there was no load"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await world.manager.resume("mirror")


async def nothing_owed(world: World) -> bool:
    """Carry what is due; what failed a moment ago is due a moment later."""
    await world.manager.relay().drain()
    return await pending(world.engine) == 0


async def frozen(world: World) -> set[tuple[str, str]]:
    """What truly differs, read by a checker of its own when nobody writes and nothing is owed."""
    await eventually(lambda: nothing_owed(world))
    ours = {(row["tenant_id"], row["number"]): row["content"] for row in await rows(world.engine, "select * from note")}
    held = [event for event in world.secondary.held.values() if event.content is not None]
    theirs = {(event.tenant_id, event.resource_id): event.content for event in held}
    return {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}


@pytest.mark.timeout(120 + SECONDS)
@pytest.mark.parametrize("summed", [True, False], ids=["by ranges", "by pages"])
async def test_no_load_is_ever_taken_for_drift(primary: AsyncEngine, summed: bool) -> None:
    """R4: each of many comparisons under full load reports the forged note, exactly, and not one other."""
    pace = [0.02]
    secondary = ScriptedSecondary("mirror", pace=lambda: random.random() * pace[0])
    world = await World(primary, secondary, summed=summed, batch_size=3).open()
    for tenant in TENANTS:
        await world.write(QUIET, tenant=tenant)
    await world.relay()
    forged = ("north", "Note", FORGED)
    world.secondary.held[forged] = msgspec.structs.replace(world.secondary.held[forged], content=said("forged"))

    reports: list[ReconciliationResult] = []
    writers = [Writer(world, seed) for seed in range(4)]
    async with load(world, writers):
        deadline = time.monotonic() + SECONDS / 2
        while time.monotonic() < deadline:
            reports.append(await world.reconcile(patience=timedelta(seconds=0.5)))
    drifts = {(drift.tenant_id, drift.resource_id, drift.kind) for report in reports for drift in report.samples}
    pace[0] = 0
    different = await frozen(world)
    assert different == {("north", FORGED)}, "the load itself left drift behind"
    assert {(tenant, name) for tenant, name, _ in drifts} == different, f"{len(reports)} reports"
    assert [report.altered for report in reports] == [1] * len(reports)
    assert [report for report in reports if report.missing or report.extra or report.stale] == []
    assert sum(report.in_flight for report in reports) > 0, "the load never got in the way, so nothing was shown"
    assert min(writer.written for writer in writers) > 0
