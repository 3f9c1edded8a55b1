"""Promise 4: a secondary never goes backwards, what was deleted never comes back; a stale write counts as done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Registration, SyncConfig, SyncEvent, SyncManager
from outbox.errors import SettingsError
from outbox.secondaries.base import Applied, Rejected, Retry, Stale
from outbox.secondaries.sql import SqlSecondary
from tests.relaying import change, claim_by_hand, execute, hold_of, manager_of, pending, removal, rows, running, write
from tests.scripted import Broken, ScriptedSecondary
from tests.waiting import eventually


@pytest.fixture
async def sql(directory: Path) -> AsyncIterator[SqlSecondary]:
    secondary = SqlSecondary("sql", f"sqlite+aiosqlite:///{directory}/held.db")
    yield secondary
    await secondary.aclose()


async def one(primary: AsyncEngine, **settings: Any) -> tuple[ScriptedSecondary, SyncManager]:
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, **settings)
    await manager.register()
    return secondary, manager


async def positions(primary: AsyncEngine) -> list[int]:
    return [row["event_id"] for row in await rows(primary, "select event_id from outbox order by event_id")]


async def nothing_owed(primary: AsyncEngine) -> bool:
    return await pending(primary) == 0


async def test_a_write_that_arrives_late_from_a_lost_relay_changes_nothing(
    primary: AsyncEngine, sql: SqlSecondary
) -> None:
    """O3, L4: a relay vanishes with version 1 in hand; 2 gets through elsewhere; then its request arrives after all."""
    late = await _lose_and_overtake(primary, sql, change("1", 2))
    assert await sql.apply(late) == [Stale()]
    assert await sql.content_of("Thing", "1") == '{"value":2}'


async def test_what_was_deleted_stays_deleted_when_an_older_update_arrives_late(
    primary: AsyncEngine, sql: SqlSecondary
) -> None:
    """O4: the tombstone knows its position."""
    late = await _lose_and_overtake(primary, sql, removal("1"))
    assert await sql.apply(late) == [Stale()]
    assert await sql.content_of("Thing", "1") is None


async def _lose_and_overtake(primary: AsyncEngine, sql: SqlSecondary, newer: SyncEvent) -> list[SyncEvent]:
    manager = manager_of(primary, sql)
    await manager.register()
    await write(manager, change("1", 1))
    vanished = await claim_by_hand(primary, sql.backend_id)
    assert vanished is not None
    async with running(manager.relay()):
        await write(manager, newer)
        await eventually(lambda: nothing_owed(primary))
    return vanished.events


async def test_a_resource_that_comes_again_after_its_delete_stands_above_the_tombstone(primary: AsyncEngine) -> None:
    """O5: positions go on growing through delete and create."""
    secondary, manager = await one(primary)
    for event in (change("1", 1), removal("1"), change("1", 3), removal("1"), change("1", 5)):
        await write(manager, event)
        assert await manager.relay().drain() == 1
    assert secondary.sent == await positions(primary)
    assert secondary.content_of("Thing", "1") == '{"value":5}'


async def test_a_refused_stale_write_counts_as_done(primary: AsyncEngine) -> None:
    """Promise 4: nothing stays owed, nothing is held, and the count says stale."""
    secondary, manager = await one(primary)
    await write(manager, change("1", 1))
    secondary.script("1", Stale())
    assert await manager.relay().drain() == 1
    status = await manager.backend_status("search")
    assert (status.pending, status.failing, status.stale, status.applied) == (0, 0, 1, 0)


async def test_a_redelivery_counts_as_done(primary: AsyncEngine) -> None:
    """Promises 2 and 4: the write took effect and its answer was lost; sent again it is stale, and done."""
    secondary, manager = await one(primary)
    await write(manager, change("1", 1))
    secondary.script("1", Broken(ConnectionResetError()))
    async with running(manager.relay()):
        await eventually(lambda: nothing_owed(primary))
    assert [call.outcomes for call in secondary.calls if call.ending == "answered"] == [[Stale()]]
    status = await manager.backend_status("search")
    assert (status.retried, status.stale, status.failing) == (1, 1, 0)


async def test_a_newer_event_supersedes_a_dead_one(primary: AsyncEngine) -> None:
    """O8: poison version 3 is dead; 4 is delivered without any hand, 3 is never tried again."""
    secondary, manager = await one(primary)
    secondary.script("1", Rejected("poison"))
    await write(manager, change("1", 3))
    assert await manager.relay().drain() == 1
    assert [failure.state for failure in await manager.failures()] == ["dead"]

    await write(manager, change("1", 4))
    assert await manager.relay().drain() == 1
    assert secondary.sent == await positions(primary)
    status = await manager.backend_status("search")
    assert (status.pending, status.dead, status.rejected, status.superseded, status.applied) == (0, 0, 1, 1, 1)


async def test_a_revived_key_has_its_attempts_at_zero(primary: AsyncEngine) -> None:
    """Design, state ordering: the newer event's first failure is the first, and the error is its own."""
    secondary, manager = await one(primary, retry_initial=30, retry_max=30)
    secondary.script("1", Rejected("poison"), Retry("busy"))
    await write(manager, change("1", 3))
    await manager.relay().drain()
    await write(manager, change("1", 4))
    await manager.relay().drain()
    hold = await hold_of(primary, "1")
    assert hold is not None
    assert (hold["state"], hold["attempts"], hold["error_code"]) == ("retrying", 1, "busy")
    assert hold["event_ids"] == (await positions(primary))[-1:]
    assert hold["first_failed_at"] == hold["last_failed_at"]


async def test_a_revived_key_whose_relay_vanishes_has_spent_one_attempt(primary: AsyncEngine) -> None:
    """O8, B2: what killed version 3 is not held against 4, also when the attempt that revived it is lost."""
    secondary, manager = await one(primary, max_attempts=3, retry_initial=0.001, retry_max=0.001)
    secondary.always("1", Retry("poison"))
    await write(manager, change("1", 3))
    async with running(manager.relay()):
        await eventually(lambda: _is_dead(manager))
    secondary.heal("1")
    await write(manager, change("1", 4))
    assert await claim_by_hand(primary, "search")

    async with running(manager.relay()):
        await eventually(lambda: nothing_owed(primary))
    assert secondary.content_of("Thing", "1") == '{"value":4}'


async def _is_dead(manager: SyncManager) -> bool:
    return [failure.state for failure in await manager.failures()] == ["dead"]


async def test_an_event_that_waited_behind_a_failing_one_has_all_its_own_attempts(primary: AsyncEngine) -> None:
    """`max_attempts` counts the failures of one event: 4, absorbed while 3 was failing, fails once and lives."""
    secondary, manager = await one(primary, max_attempts=3, retry_initial=0.001, retry_max=0.001)
    secondary.script("1", Retry("three"), Retry("three"))
    await write(manager, change("1", 3))
    for _ in range(2):
        await eventually(lambda: manager.relay().run_once("search"))
    await execute(primary, "update outbox_hold set next_attempt_at = now() + interval '1 hour'")
    await write(manager, change("1", 4))
    await manager.relay().run_once("search")
    await execute(primary, "update outbox_hold set next_attempt_at = now()")
    secondary.script("1", Retry("four"))
    assert await manager.relay().run_once("search") == 1

    hold = await hold_of(primary, "1")
    assert hold is not None
    assert (hold["error_code"], hold["attempts"], hold["state"]) == ("four", 1, "retrying")


async def test_a_newer_event_replaces_the_one_its_hold_waits_with(primary: AsyncEngine) -> None:
    """Coalescing in a hold: the next try sends version 4 and never 3; it waits as long as the key had to."""
    secondary, manager = await one(primary, retry_initial=30, retry_max=30)
    secondary.script("1", Retry("busy"))
    await write(manager, change("1", 3))
    await manager.relay().drain()
    before = await hold_of(primary, "1")
    await write(manager, change("1", 4))
    await manager.relay().run_once("search")
    after = await hold_of(primary, "1")
    assert before is not None
    assert after is not None
    assert after["event_ids"] == (await positions(primary))[-1:]
    assert after["next_attempt_at"] == before["next_attempt_at"]
    await execute(primary, "update outbox_hold set next_attempt_at = now()")
    assert await manager.relay().drain() == 1
    assert secondary.sent == await positions(primary)


async def test_in_log_order_a_dead_event_is_not_superseded(primary: AsyncEngine) -> None:
    """O8 the other way: every event counts, so the later ones wait behind the dead one until somebody acts."""
    secondary = ScriptedSecondary("archive")
    manager = manager_of(primary, Registration(secondary, ordering="log"))
    await manager.register()
    secondary.script("1", Rejected("poison"))
    await write(manager, change("1", 3))
    await manager.relay().drain()
    await write(manager, change("1", 4), change("2"))
    async with running(manager.relay()):
        await eventually(lambda: secondary.sent_to("2"))
    hold = await hold_of(primary, "1")
    assert hold is not None
    assert (hold["state"], hold["event_ids"]) == ("dead", (await positions(primary))[:2])
    assert len(secondary.sent_to("1")) == 1


async def test_no_secondary_ever_held_an_older_state(primary: AsyncEngine) -> None:
    """O3 under load: updates and deletes of few keys, answers lost at random, two relays."""
    secondary, manager = await one(primary, batch_size=4)
    other = manager_of(primary, secondary, batch_size=4)
    for number in range(0, 120, 3):
        secondary.script(str(number % 5), None, Broken(ConnectionResetError()), None)
    async with running(manager.relay(), other.relay()):
        for number in range(120):
            event = removal(str(number % 5)) if number % 7 == 0 else change(str(number % 5), number)
            await write(manager, event)
            await asyncio.sleep(0)
        await eventually(lambda: nothing_owed(primary))
    held: dict[str, int] = {}
    for event in secondary.history:
        assert (event.position or 0) > held.get(event.resource_id, 0)
        held[event.resource_id] = event.position or 0
    newest = {event.resource_id: event.position for event in secondary.held.values()}
    table = "select resource_id, max(event_id) as position from outbox group by resource_id"
    assert newest == {row["resource_id"]: row["position"] for row in await rows(primary, table)}
    assert any(isinstance(each, Applied) for call in secondary.calls for each in call.outcomes)


class Brief(ScriptedSecondary):
    """Remembers a delete for a minute."""

    tombstones_for = timedelta(minutes=1)


async def test_a_secondary_that_forgets_deletes_too_soon_is_refused(primary: AsyncEngine) -> None:
    """G4: a tombstone must outlive the longest time that an older write can be under way."""
    with pytest.raises(SettingsError, match=r"secondaries\.brief\.tombstones_for': must not be below .*0:01:15"):
        SyncManager(primary, [Brief("brief")])
    SyncManager(primary, [Brief("brief")], config=SyncConfig(attempt_deadline=30, lease=15))
