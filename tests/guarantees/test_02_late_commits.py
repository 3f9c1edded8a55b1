"""Promise 2, D3: positions commit in any order; what commits late, below what was delivered, is delivered."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import SyncEvent, SyncManager, record
from outbox.lanes import Lanes, advance_floors
from outbox.schema import LANES
from tests.relaying import change, claim_fresh, manager_of, raw, rows, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

FAR = 10**9


@pytest.fixture
def secondary() -> ScriptedSecondary:
    return ScriptedSecondary("search")


@pytest.fixture
async def manager(primary: AsyncEngine, secondary: ScriptedSecondary) -> SyncManager:
    manager = manager_of(primary, secondary, prune_interval=0.02)
    await manager.register()
    return manager


@asynccontextmanager
async def uncommitted(primary: AsyncEngine, *events: SyncEvent) -> AsyncIterator[None]:
    """Hold events recorded and not committed for as long as the block lasts."""
    async with raw(primary) as connection, connection.transaction():
        await record(connection, events)
        yield


async def advance(primary: AsyncEngine, lanes: Lanes) -> None:
    async with raw(primary) as connection:
        await advance_floors(connection, "public", "search", lanes)


async def claimed(primary: AsyncEngine, lanes: Lanes) -> list[str]:
    attempts = await claim_fresh(primary, "search", lanes=lanes)
    return sorted(event.resource_id for attempt in attempts for event in attempt.events)


async def test_an_event_that_commits_after_later_positions_were_delivered_is_delivered(
    primary: AsyncEngine, manager: SyncManager, secondary: ScriptedSecondary
) -> None:
    """D3, in a running relay whose floors rise all the time; its full look is a minute away."""
    folded = """
        select folded_through > 0 and folded_through = (select max(attempt_id) from outbox_attempt)
        from outbox_secondary
    """
    async with running(manager.relay()):
        for round_ in range(3):
            async with uncommitted(primary, change("late", round_, tenant="late")):
                # The relay raises its floors right after it folds what is finished.
                for number in range(4):
                    await write(manager, change("early", number))
                    await eventually(lambda: value(primary, folded))
            await eventually(lambda count=round_ + 1: len(secondary.sent_to("late")) == count, timedelta(seconds=5))
    assert max(secondary.sent_to("early")[:4]) > min(secondary.sent_to("late")), "no commit was late"


async def test_no_floor_passes_a_writer_that_still_runs(primary: AsyncEngine, manager: SyncManager) -> None:
    """D3: the writer began before others that are done."""
    lanes = Lanes()
    async with uncommitted(primary, change("late", tenant="late")):
        await write(manager, change("early"))
        assert await claimed(primary, lanes) == ["early"]
        for _ in range(4):
            await advance(primary, lanes)
    assert await claimed(primary, lanes) == ["late"]


async def test_no_floor_passes_the_newest_writer_that_still_runs(primary: AsyncEngine, manager: SyncManager) -> None:
    """D3: no transaction younger than the writer's had ended when the relay looked at how far positions go."""
    lanes = Lanes()
    await write(manager, change("early"))
    assert await claimed(primary, lanes) == ["early"]
    async with uncommitted(primary, change("late", tenant="late")):
        await advance(primary, lanes)
        await write(manager, change("other"))
        assert await claimed(primary, lanes) == ["other"]
        for _ in range(4):
            await advance(primary, lanes)
    assert await claimed(primary, lanes) == ["late"]


async def test_no_floor_passes_any_of_several_newest_writers(primary: AsyncEngine, manager: SyncManager) -> None:
    """D3: of three running writers the first ends, then the second; the third is still not passed."""
    lanes = Lanes()
    async with uncommitted(primary, change("third", tenant="c")):
        async with uncommitted(primary, change("second", tenant="b")):
            async with uncommitted(primary, change("first", tenant="a")):
                await advance(primary, lanes)
            await advance(primary, lanes)
        await advance(primary, lanes)
        assert await claimed(primary, lanes) == ["first", "second"]
        await advance(primary, lanes)
    assert await claimed(primary, lanes) == ["third"]


async def test_floors_rise_once_every_older_writer_has_ended(primary: AsyncEngine, manager: SyncManager) -> None:
    """The floor is worth having: it passes what is done, in every lane."""
    lanes = Lanes()
    for number in range(20):
        await write(manager, change(str(number), tenant=f"tenant-{number}"))
    assert len(await claimed(primary, lanes)) == 20
    for _ in range(2):
        await advance(primary, lanes)
    (highest,) = await rows(primary, "select max(event_id) as position from outbox")
    assert lanes.floors == [highest["position"]] * LANES


async def test_it_is_not_quiet_while_a_writer_may_still_commit(primary: AsyncEngine, manager: SyncManager) -> None:
    """A relay that took it to be quiet would not look for what that writer commits."""
    lanes = Lanes()
    async with uncommitted(primary, change("late")):
        for _ in range(4):
            await advance(primary, lanes)
            assert lanes.quiet is None
    for _ in range(4):
        await advance(primary, lanes)
    assert lanes.quiet is None, "it is owed"
    assert await claimed(primary, lanes) == ["late"]
    for _ in range(2):
        await advance(primary, lanes)
    assert lanes.quiet == await value(primary, "select max(event_id) from outbox")


async def test_a_floor_stays_below_what_still_waits_in_its_lane(primary: AsyncEngine, manager: SyncManager) -> None:
    """The floor is exact: it rises to just below the lowest waiting delivery."""
    lanes = Lanes()
    await write(manager, change("done", 1), change("waits", 2), change("waits", 3))
    positions = [row["event_id"] for row in await rows(primary, "select event_id from outbox order by 1")]
    async with raw(primary) as connection:
        await connection.execute("delete from outbox_delivery where event_id = $1", positions[0])
    for _ in range(2):
        await advance(primary, lanes)
    lanes_used = await rows(primary, "select distinct lane from outbox_delivery")
    assert lanes.floors[lanes_used[0]["lane"]] == positions[1] - 1
    assert await claimed(primary, lanes) == ["waits", "waits"]


async def test_a_full_look_finds_what_lies_below_a_wrong_floor(primary: AsyncEngine, manager: SyncManager) -> None:
    """The net under the floors' reasoning."""
    lanes = Lanes()
    lanes.floors = [FAR] * LANES
    await write(manager, change("below"))
    assert await claimed(primary, lanes) == []
    lanes.look_everywhere()
    assert await claimed(primary, lanes) == ["below"]


async def test_a_transaction_that_never_ends_stops_no_delivery(
    primary: AsyncEngine, manager: SyncManager, secondary: ScriptedSecondary
) -> None:
    """D4: nothing but the floors waits for the oldest transaction of the server."""
    async with uncommitted(primary, change("never", tenant="idle")), running(manager.relay()):
        for number in range(20):
            await write(manager, change(str(number), tenant=f"tenant-{number}"))
        await eventually(lambda: len(secondary.held) == 20, timedelta(seconds=5))


async def test_a_relay_s_floors_follow_what_it_delivered_and_a_look_below_them_is_not_undone(
    primary: AsyncEngine,
) -> None:
    """PERFORMANCE: busy or idle; the net under their reasoning really looks at everything once."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, prune_interval=0.05)
    await manager.register()
    relay = manager.relay()
    carrier = relay._carriers["search"]
    async with running(relay):
        for _ in range(3):
            await write(manager, *(change(str(number)) for number in range(50)))
            highest = await value(primary, "select max(event_id) from outbox")
            await eventually(lambda least=highest: min(carrier._floors.lanes.floors) >= least)
        lanes, looked = carrier._floors.lanes, []
        shares = lanes.shares
        lanes.shares = lambda size: looked.append(min(lanes.floors)) or shares(size)  # type: ignore[method-assign,func-returns-value]
        carrier._floors._look_everywhere_at = 0.0
        await eventually(lambda: 0 in looked)
        await eventually(lambda: min(lanes.floors) >= highest)
