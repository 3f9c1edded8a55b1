"""Guarantees 4 and 10 when history goes back: what was written since arrives, and is not done before it did.

A secondary that is ahead would refuse it as older than what it holds of the lost history, which counts as done.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Registration, SyncEvent, SyncManager, SyncState, SyncToken
from outbox.secondaries.base import Rejected
from outbox.statement import Statement
from tests.guarantees.test_04_ahead_of_the_primary import one, rewind
from tests.relaying import change, claim_by_hand, execute, hold_of, manager_of, pending, running, value, write
from tests.scripted import ScriptedSecondary, position_of
from tests.waiting import eventually

NOTE = """
insert into outbox_reconciliation (backend_id, repair, actor, reason, high_water, primary_count, secondary_count,
    missing, extra, stale, altered, in_flight, repaired, refused, started_at)
values ('search', true, '', '', 0, 1, 1, :missing, 0, 0, 0, 0, 0, 0, clock_timestamp())
"""


HELD = """
insert into outbox_hold
    (backend_id, tenant_id, resource_type, resource_id, key_hash, event_ids, oldest_id, owed_since, state, attempts)
select 'search', tenant_id, resource_type, resource_id,
       hashtextextended(tenant_id || '/' || resource_type || '/' || resource_id, 0), array[event_id], event_id,
       created_at, '{}', 1
from outbox where event_id = :id
"""

World = Callable[[AsyncEngine], AbstractAsyncContextManager[tuple[SyncManager, ScriptedSecondary]]]


async def recorded(manager: SyncManager, *events: SyncEvent) -> SyncToken:
    async with manager.session() as session:
        async with session.begin():
            session.record(*events)
        assert session.token is not None
        return session.token


async def state_of(manager: SyncManager, token: SyncToken, timeout: float = 30) -> SyncState:
    return (await manager.wait_for_sync(token, timeout=timeout))["search"].state


def number(secondary: ScriptedSecondary, resource_id: str) -> str | None:
    return secondary.held["default", "Thing", resource_id].content


async def test_what_was_written_meanwhile_wins(primary: AsyncEngine) -> None:
    """C4: it is above the lost history from the move on, and below whatever is written later."""
    async with one(primary) as (manager, secondary):
        await write(manager, change("9", 1), change("8", 1))
        async with running(manager.relay()):
            await eventually(lambda: value(primary, "select beyond from outbox_secondary"))
            moved = await manager.move_past()
            assert (moved.before, moved.after, moved.ahead, moved.again) == (7, 12, ("search",), 2)
            await write(manager, change("8", 2))
            await eventually(lambda: pending_none(primary))
        assert (number(secondary, "9"), number(secondary, "8")) == ('{"value":1}', '{"value":2}')
        assert [position_of(secondary.held["default", "Thing", name]) for name in "98"] == [11, 13]
        assert await value(primary, "select stale from outbox_lag") == 0


async def test_nobody_is_told_that_it_arrived_before_it_did(primary: AsyncEngine) -> None:
    """W1, C4: a token from before the move waits for what stands in its stead."""
    async with one(primary) as (manager, secondary):
        token = await recorded(manager, change("9", 1))
        await manager.move_past()
        # Whoever is told too early is told at once.
        assert not (await state_of(manager, token, timeout=3)).done
        secondary.always("9", Rejected("unreadable", "no"))
        await manager.relay().drain()
        assert await state_of(manager, token) is SyncState.DEAD
        secondary.heal("9")
        await manager.redrive()
        await manager.relay().drain()
        assert (await state_of(manager, token)).done
        assert number(secondary, "9") == '{"value":1}'


@asynccontextmanager
async def in_log_order(primary: AsyncEngine) -> AsyncIterator[tuple[SyncManager, ScriptedSecondary]]:
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, Registration(secondary, ordering="log"))
    await manager.register()
    for each in range(10):
        await write(manager, change(f"{each}"))
    await manager.relay().drain()
    await rewind(primary, 5)
    yield manager, secondary
    await manager.aclose()


@pytest.mark.parametrize("world", [one, in_log_order])
async def test_wherever_it_is_owed(primary: AsyncEngine, world: World) -> None:
    """C4, guarantee 2: fresh, in a hold that failed, or in the hands of a relay that is gone."""
    async with world(primary) as (manager, secondary):
        await write(manager, change("dead", 1), change("9", 1))
        assert await claim_by_hand(primary, "search") is not None
        await write(manager, change("9", 2), change("7", 1))
        await execute(primary, HELD.format("dead"), id=4)
        before = await pending(primary)
        moved = await manager.move_past()
        assert (moved.again, await pending(primary)) == (before, before + 2)
        dead = await hold_of(primary, "3")
        assert dead is not None
        assert (dead["state"], dead["oldest_id"], dead["event_ids"]) == ("dead", 4, [11])
        await manager.redrive()
        async with running(manager.relay()):
            await eventually(lambda: pending_none(primary))
        assert [number(secondary, name) for name in ("dead", "9", "7")] == ['{"value":1}', '{"value":2}', '{"value":1}']


async def test_a_move_that_was_cut_off_leaves_them_withheld(
    primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C4: between the two steps nothing is carried, and the next call does the rest."""

    async with one(primary) as (manager, secondary):
        await write(manager, change("9", 1))
        with monkeypatch.context() as patched:
            patched.setattr("outbox.ahead.CLEAR", Statement("select 1 / 0, cast(:ahead as text[])"))
            with pytest.raises(DBAPIError):
                await manager.move_past()
        calls = len(secondary.calls)
        assert await manager.relay().drain() == 0
        assert (len(secondary.calls), await pending(primary)) == (calls, 1)
        assert (await manager.move_past()).again == 1
        await manager.relay().drain()
        assert number(secondary, "9") == '{"value":1}'


async def test_nobody_is_said_to_be_in_step_before_it_was_compared(primary: AsyncEngine) -> None:
    """C4, N3: with nothing owed and nothing refused, what the lost history left there is still there."""
    async with one(primary) as (manager, _):
        await execute(primary, NOTE, missing=0)
        await manager.move_past()
        await manager.relay().drain()
        (status,) = await manager.all_statuses()
        assert (status.pending, status.beyond, status.doubted) == (0, None, True)
        assert [reason.split(":")[0] for reason in status.reasons] == ["history"]
        await execute(primary, NOTE, missing=0)
        (status,) = await manager.all_statuses()
        assert (status.doubted, status.reasons) == (False, ())
        await execute(primary, "update outbox_secondary set doubted_at = clock_timestamp()")
        assert not (await manager.backend_status("search")).healthy


async def pending_none(engine: AsyncEngine) -> bool:
    return await pending(engine) == 0
