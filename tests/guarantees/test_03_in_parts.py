"""Promises 3, 4 and 5 for batches that go in parts: order, no way back, and nothing from whoever lost the lease."""

from __future__ import annotations

import asyncio
import random
from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Registration, SyncEvent
from outbox.secondaries.base import Rejected, Retry
from tests.relaying import claim_by_hand, everything, execute, manager_of, pending, rows, running, write
from tests.scripted import Hang, ScriptedSecondary, by_key, overlaps
from tests.waiting import eventually

BUDGET = 64_000
SIZES = (20, 200, 3_000, 20_000, 50_000, 90_000)
TENANTS = ("acme", "globex", "initech")
QUIET = 3600
"""Seconds between housekeeping in tests that compare every row."""


def sized(resource_id: str, size: int, tenant: str = "default") -> SyncEvent:
    text = '{"text":"' + "x" * size + '"}'
    return SyncEvent.update("Thing", resource_id, text, tenant_id=tenant)


@pytest.mark.parametrize("ordering", ["state", "log"])
@pytest.mark.parametrize("seed", range(3))
async def test_contents_of_all_sizes_arrive_whole_in_order_and_never_twice_at_once(
    primary: AsyncEngine, ordering: str, seed: int
) -> None:
    """O1, O3, F10: two relays, keys that fail in every way, and no call above the budget but of one event."""
    chance = random.Random(seed)
    secondary = ScriptedSecondary("search", pace=lambda: chance.uniform(0, 0.003))
    for name in map(str, range(0, 20, 4)):
        secondary.script(name, *chance.choices([Retry("later"), RuntimeError(), None], k=3))
    secondary.always("refused", Rejected("bad"))
    registration = Registration(secondary, ordering=ordering)
    first, second = (manager_of(primary, registration, batch_bytes=BUDGET, batch_size=20) for _ in range(2))
    await first.register()
    names = [*map(str, range(20)), "refused"]
    events = [sized(chance.choice(names), chance.choice(SIZES), chance.choice(TENANTS)) for _ in range(150)]
    async with running(first.relay(), second.relay()):
        for event in events:
            await write(first, event)
        await eventually(lambda: settled(primary))
    assert not list(overlaps(secondary.calls))
    assert all(weight(call.events) <= BUDGET or len(call.events) == 1 for call in secondary.calls)
    assert all(positions == sorted(positions) for positions in by_key(secondary.history).values())
    wanted: dict[tuple[str, str, str], list[str | None]] = {}
    for event in events:
        if event.resource_id != "refused":
            wanted.setdefault(event.key, []).append(event.content)
    arrived: dict[tuple[str, str, str], list[str | None]] = {}
    for event in secondary.history:
        arrived.setdefault(event.key, []).append(event.content)
    if ordering == "log":
        assert arrived == wanted
    assert {key: contents[-1] for key, contents in arrived.items()} == {key: each[-1] for key, each in wanted.items()}


def weight(events: list[SyncEvent]) -> int:
    return sum(len(event.content or "") for event in events)


async def settled(primary: AsyncEngine) -> bool:
    """Only what was refused is left."""
    owed = await rows(
        primary, "select sum(cardinality(event_ids)) as owed from outbox_hold where resource_id = 'refused'"
    )
    return await pending(primary) == (owed[0]["owed"] or 0)


async def test_whoever_lost_the_lease_between_parts_sends_no_more_and_changes_nothing(primary: AsyncEngine) -> None:
    """L2, L3: another relay took over while the first part was out; every row stays as that one left it."""
    slow, other = ScriptedSecondary("search"), ScriptedSecondary("search")
    slow.script("1", Hang())
    late, taking = (
        manager_of(primary, each, batch_bytes=15_000, lease=60, prune_interval=QUIET) for each in (slow, other)
    )
    await late.register()
    await write(late, *(sized(name, 10_000) for name in "123"))
    carrying = asyncio.create_task(late.relay().run_once("search"))
    await eventually(lambda: slow.running)
    await execute(primary, "update outbox_attempt set lease_until = now() - interval '1 second'")
    async with running(taking.relay()):
        await eventually(lambda: nothing_owed(primary))
    before = await everything(primary)
    slow.release()
    await carrying
    assert [call.names for call in slow.calls] == [["1"]]
    assert await everything(primary) == before
    assert {event.resource_id for event in other.history} == {"1", "2", "3"}


async def nothing_owed(primary: AsyncEngine) -> bool:
    return await pending(primary) == 0


async def test_a_relay_that_died_between_parts_loses_nothing(primary: AsyncEngine) -> None:
    """B1, F10: what it had taken is taken over whole; whether a part had arrived does not matter."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, batch_bytes=15_000)
    await manager.register()
    await write(manager, *(sized(name, 10_000) for name in "123"))
    assert await claim_by_hand(primary, "search", lease=timedelta(milliseconds=1))
    async with running(manager.relay()):
        await eventually(lambda: nothing_owed(primary))
    assert {event.resource_id for event in secondary.history} == {"1", "2", "3"}
    assert all(weight(call.events) <= 15_000 for call in secondary.calls)
