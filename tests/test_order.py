"""Order and versions where they are easily lost: after pruning, crashes and replays, and beside a frozen secondary."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from outbox import MemorySecondary, Registration, SyncManager
from outbox.errors import Unavailable
from outbox.migrate import migrate
from outbox.secondaries.base import Rejected, Retry, Stale
from outbox.secondaries.sql import SqlSecondary
from tests.relaying import (
    change,
    claim_by_hand,
    execute,
    manager_of,
    own_server,
    pending,
    raw,
    removal,
    rows,
    running,
    value,
    write,
)
from tests.scripted import ScriptedSecondary, by_key
from tests.waiting import eventually

# What an operator does who knows no better: the event is owed once more.
REPLAY = """
insert into outbox_delivery (backend_id, lane, event_id, key_hash)
select 'search', hashtextextended(tenant_id, 0) & 63, event_id,
       hashtextextended(tenant_id || '/' || resource_type || '/' || resource_id, 0)
from outbox where event_id = :position
"""
PRUNED_AT_ONCE = {"keep_events": 0.001, "keep_attempts": 0.001, "prune_interval": 0.02}


async def nothing_owed(primary: AsyncEngine) -> bool:
    return await pending(primary) == 0


async def nothing_known(primary: AsyncEngine) -> bool:
    counts = "select (select count(*) from outbox) + (select count(*) from outbox_attempt) + "
    return await value(primary, counts + "(select count(*) from outbox_hold)") == 0


async def positions(primary: AsyncEngine) -> list[int]:
    return [row["event_id"] for row in await rows(primary, "select event_id from outbox order by event_id")]


async def test_a_tombstone_outlives_all_that_the_primary_knew_of_its_key(primary: AsyncEngine, directory: Path) -> None:
    """O4, O5: after everything was pruned, a write that was under way is stale, and what is created again is not."""
    sql = SqlSecondary("sql", f"sqlite+aiosqlite:///{directory}/held.db")
    manager = manager_of(primary, sql, **PRUNED_AT_ONCE)
    await manager.register()
    await write(manager, change("1", 4))
    vanished = await claim_by_hand(primary, "sql")
    assert vanished is not None
    async with running(manager.relay()):
        await write(manager, removal("1"))
        await eventually(lambda: nothing_known(primary))
    assert await sql.apply(vanished.events) == [Stale()]
    assert await sql.content_of("Thing", "1") is None

    await write(manager, change("1", 6))
    (again,) = await positions(primary)
    assert again > (vanished.events[0].position or 0) + 1
    await manager.relay().drain()
    assert await sql.content_of("Thing", "1") == '{"value":6}'
    assert await sql.apply(vanished.events) == [Stale()]
    await sql.aclose()


async def test_any_arrival_of_deletes_and_re_creations_ends_in_the_last(primary: AsyncEngine) -> None:
    """O4, O5: the whole history of few keys, with repetitions, in any order of arrival."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, Registration(secondary, ordering="log"))
    await manager.register()
    for number in range(60):
        await write(manager, random.choice([removal, change])(str(number % 4)))
    await manager.relay().drain()
    history = [event for call in secondary.calls for event in call.events]
    assert len(history) == 60
    newest = {event.key: event.content for event in sorted(history, key=lambda event: event.position or 0)}
    for _ in range(100):
        other = MemorySecondary()
        await other.apply(random.sample(history * 2, k=120))
        assert {key: event.content for key, event in other.held.items()} == newest


async def test_positions_go_on_above_all_that_was_delivered_after_a_crash() -> None:
    """O5: PostgreSQL forgets what it handed out ahead, never what a secondary may have seen."""
    with own_server() as server:
        engine = create_async_engine(server.dsn(), poolclass=NullPool)
        await migrate(engine)
        secondary = ScriptedSecondary("search")
        manager = manager_of(engine, secondary)
        await manager.register()
        for number in range(3):
            await write(manager, change("1", 10 * number))
            await eventually(manager.relay().drain)
            seen = secondary.sent[-1]
            server.crash()
            server.start()
            await write(manager, change("1", 10 * number + 1))
            await eventually(manager.relay().drain)
            assert secondary.sent[-1] > seen
            assert secondary.content_of("Thing", "1") == f'{{"value":{10 * number + 1}}}'
        await engine.dispose()


async def dead_then_newer(primary: AsyncEngine, **terms: Any) -> tuple[ScriptedSecondary, SyncManager, list[int]]:
    """Version 3 is dead, 4 came after it."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, Registration(secondary, **terms))
    await manager.register()
    secondary.script("1", Rejected("poison"))
    await write(manager, change("1", 3))
    await manager.relay().drain()
    await write(manager, change("1", 4))
    return secondary, manager, await positions(primary)


async def test_an_old_dead_event_that_is_replayed_changes_nothing(primary: AsyncEngine) -> None:
    """O8: version 4 was delivered since, so 3 is stale, which counts as done."""
    secondary, manager, (three, four) = await dead_then_newer(primary)
    await manager.relay().drain()
    await execute(primary, REPLAY, position=three)
    assert await manager.relay().drain() == 1
    assert secondary.sent == [three, four, three]
    assert secondary.calls[-1].outcomes == [Stale()]
    assert secondary.content_of("Thing", "1") == '{"value":4}'
    status = await manager.backend_status("search")
    assert (status.pending, status.failing, status.dead, status.stale) == (0, 0, 0, 1)


DUE_AGAIN = "update outbox_hold set state = 'released', attempts = 0, next_attempt_at = clock_timestamp()"


async def test_a_dead_event_made_due_while_a_newer_one_waits_is_superseded(primary: AsyncEngine) -> None:
    """O8: only 4 is sent, and both are done."""
    secondary, manager, (three, four) = await dead_then_newer(primary)
    await execute(primary, DUE_AGAIN)
    await eventually(manager.relay().drain)
    await eventually(lambda: nothing_owed(primary))
    assert secondary.sent == [three, four]
    status = await manager.backend_status("search")
    assert (status.applied, status.superseded, status.rejected) == (1, 1, 1)


async def test_in_log_order_a_dead_event_made_due_goes_before_the_newer_ones(primary: AsyncEngine) -> None:
    """O8 the other way: what waited behind it comes after it, in order."""
    secondary, manager, (three, four) = await dead_then_newer(primary, ordering="log")
    await manager.relay().drain()
    await execute(primary, DUE_AGAIN)
    async with running(manager.relay()):
        await eventually(lambda: nothing_owed(primary))
    assert secondary.sent == [three, three, four]
    assert [event.position for event in secondary.history] == [three, four]


@asynccontextmanager
async def frozen(primary: AsyncEngine, secondary: ScriptedSecondary, how: str) -> AsyncIterator[None]:
    """Let this secondary get nothing done for as long as the block lasts."""
    of_its_row = "where backend_id = 'frozen'"
    async with AsyncExitStack() as thawing:
        if how == "hangs":
            secondary.hang()
        elif how == "is down":
            secondary.down = Unavailable("refused", "")
        elif how == "fails":
            for name in "ab":
                secondary.always(name, Retry("busy"))
        elif how == "is paused":
            await execute(primary, f"update outbox_secondary set status = 'paused' {of_its_row}")
        else:
            blocking = await thawing.enter_async_context(raw(primary))
            await thawing.enter_async_context(blocking.transaction())
            await blocking.execute(f"select from outbox_secondary {of_its_row} for no key update")
        yield
    secondary.release()
    secondary.down = None
    for name in "ab":
        secondary.heal(name)
    await execute(primary, f"update outbox_secondary set status = 'live' {of_its_row}")


@pytest.mark.parametrize("how", ["hangs", "is down", "fails", "is paused", "is locked"])
async def test_the_order_of_one_secondary_never_waits_for_another(primary: AsyncEngine, how: str) -> None:
    """O10: one gets nothing done, the other gets every event in order; then the first does too."""
    stuck, free = ScriptedSecondary("frozen"), ScriptedSecondary("free")
    terms = [Registration(each, ordering="log") for each in (stuck, free)]
    manager = manager_of(primary, *terms, lease=5, batch_size=4, max_attempts=1_000_000)
    await manager.register()
    async with running(manager.relay()):
        async with frozen(primary, stuck, how):
            for number in range(10):
                await write(manager, change("a", number), change("b", number))
                await eventually(lambda number=number: len(free.history) == 2 * (number + 1))
            assert stuck.history == []
        await eventually(lambda: len(stuck.history) == 20)
    assert by_key(free.history) == by_key(stuck.history)
    assert sorted(position for each in by_key(stuck.history).values() for position in each) == await positions(primary)
    for each in by_key(stuck.history).values():
        assert each == sorted(each)
