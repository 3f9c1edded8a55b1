"""Guarantee 11, backfill: whatever the order of pages, writes and deliveries, a secondary ends up as the primary is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import permutations

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import MemorySecondary, SyncEvent
from tests.backfilling import World, families
from tests.relaying import rows
from tests.waiting import eventually

Write = Callable[[World], Awaitable[None]]
WRITES: dict[str, Write] = {
    "update": lambda world: world.write(2, "New"),
    "delete": lambda world: world.delete(2),
}
written = pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))


@pytest.fixture
async def world(primary: AsyncEngine) -> World:
    world = World(primary)
    await world.prepare(3)
    return world


async def backfill(world: World) -> None:
    await world.manager.backfill("mirror", most_owed=None)


async def blocked(world: World) -> bool:
    return bool(await rows(world.engine, "select pid from pg_stat_activity where wait_event_type = 'Lock'"))


async def check_every_order_of_delivery(world: World) -> None:
    """Deliver what is owed in each order, and compare."""
    owed = [
        SyncEvent(**row)
        for row in await rows(
            world.engine,
            "select tenant_id, resource_type, resource_id, operation, cast(content as text) as content,"
            " event_id as position from outbox join outbox_delivery using (event_id) order by event_id",
        )
    ]
    raced = [each for each in owed if each.resource_id == "north/2"]
    others = [each for each in owed if each.resource_id != "north/2"]
    for order in permutations(raced):
        secondary = MemorySecondary("mirror")
        for each in (*others, *order):
            await secondary.apply([each])
        assert families(secondary) == await world.held(), [each.position for each in order]


@written
async def test_a_write_before_its_page_is_what_the_page_reads(world: World, write: Write) -> None:
    """K1, K2: {write, read page}, then {live, page} in both orders."""
    await write(world)
    await backfill(world)
    await check_every_order_of_delivery(world)


@written
async def test_a_write_after_its_page_is_newer(world: World, write: Write) -> None:
    """K1, K2: {read page, write}, then {live, page} in both orders."""
    await backfill(world)
    await write(world)
    await check_every_order_of_delivery(world)


@written
async def test_a_write_during_its_page_waits_for_it_and_is_newer(world: World, write: Write) -> None:
    """K1, K2: the page has read the row and drawn no position yet when the write comes."""
    world.gate.armed = {2}
    filling = asyncio.create_task(backfill(world))
    await asyncio.wait_for(world.gate.reached.wait(), 20)
    writing = asyncio.ensure_future(write(world))
    await eventually(lambda: writing.done() or blocked(world))
    assert not writing.done(), "a write went past a page that had read its row"
    world.gate.opened.set()
    await asyncio.gather(filling, writing)
    assert (await world.held()).get(("north", "north/2")) in (None, "New")
    await check_every_order_of_delivery(world)


@pytest.mark.parametrize("ending", ["commit", "rollback"])
@pytest.mark.parametrize("kind", ["update", "delete"])
async def test_a_page_waits_for_a_write_that_is_under_way_and_nobody_waits_for_the_page(
    world: World, kind: str, ending: str
) -> None:
    """K1, K2, K3: the rest of the page is recorded and free; the row comes as its transaction leaves it."""
    async with world.engine.connect() as application:
        change = "update patient set family = 'New'" if kind == "update" else "delete from patient"
        await application.execute(text(f"{change} where number = 2"))
        filling = asyncio.create_task(backfill(world))
        await eventually(lambda: filling.done() or blocked(world))
        assert not filling.done(), "the page counted as done with a row left out"
        # What a backfill that kept its locks while it waits would make a deadlock.
        await application.execute(text("set local lock_timeout = '10s'"))
        await application.execute(text("update patient set family = 'Also' where number = 3"))
        await (application.commit() if ending == "commit" else application.rollback())
    await filling
    secondary = await delivered(world)
    here = {("north", "north/1"): "Old", ("north", "north/2"): "Old", ("north", "north/3"): "Old"}
    if ending == "commit":
        # This application wrote past its sessions: only what was locked when the page came is the page's affair.
        here.pop(("north", "north/2"))
        here |= {("north", "north/2"): "New"} if kind == "update" else {}
    assert families(secondary) == here


async def delivered(world: World) -> MemorySecondary:
    await world.manager.relay().drain()
    secondary = world.manager.registrations[0].secondary
    assert isinstance(secondary, MemorySecondary)
    return secondary


async def test_foreign_keys_and_another_backfill_do_not_hold_up_a_page(world: World) -> None:
    """K3: what does not change a row is no reason to wait, for the page or for others."""
    async with world.engine.connect() as application:
        await application.execute(text("do $$ begin perform from patient for key share; end $$"))
        world.gate.armed = {2}
        filling = asyncio.create_task(backfill(world))
        await asyncio.wait_for(world.gate.reached.wait(), 20)
        await application.execute(text("select from patient for share nowait"))
        world.gate.opened.set()
        await asyncio.wait_for(filling, 20)


async def test_a_row_that_is_always_locked_has_its_turn(world: World) -> None:
    """K3: the page stands in line for a row as any writer does; nobody's luck decides."""
    ending = asyncio.Event()

    async def keep_locked() -> None:
        async with world.engine.connect() as application:
            while not ending.is_set():
                await application.execute(text("select from patient where number = 2 for update"))
                await asyncio.sleep(0.02)
                await application.rollback()

    lockers = [asyncio.create_task(keep_locked()) for _ in range(3)]
    await eventually(lambda: locked_by_somebody(world))
    await asyncio.wait_for(backfill(world), 30)
    ending.set()
    await asyncio.gather(*lockers)
    assert families(await delivered(world)) == await world.held()


async def locked_by_somebody(world: World) -> bool:
    return not await rows(world.engine, "select number from patient where number = 2 for update skip locked")


async def test_who_recorded_before_the_secondary_was_known_is_waited_for(world: World) -> None:
    """D7, G2: his event is owed to the others only, and his row becomes visible after its page would have passed."""
    later = World(world.engine, MemorySecondary("later"))
    async with world.manager.session() as session:
        await session.begin()
        await session.merge(_patient(world, 0, "Late"))
        await session.flush()
        await later.manager.register()
        waiting: list[str | None] = []
        filling = asyncio.create_task(
            later.manager.backfill("later", most_owed=None, progress=lambda seen: waiting.append(seen.waiting))
        )
        await eventually(lambda: filling.done() or any(waiting))
        assert not filling.done(), "nobody was waited for"
        await session.commit()
    await filling
    assert families(await delivered(later)) == await world.held()


def _patient(world: World, number: int, family: str) -> object:
    (tracked,) = world.manager.tracking
    return tracked.entity(tenant_id="north", number=number, family=family)
