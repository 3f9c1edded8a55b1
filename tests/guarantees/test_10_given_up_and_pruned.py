"""Guarantee 10: what was given up stays so for whoever asks, as long as any event that the note stands for is kept."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import SyncState, SyncToken, record
from outbox.operate import Which
from outbox.prune import prune_discarded, prune_events
from outbox.secondaries.base import Rejected
from tests.relaying import change, manager_of, raw, value
from tests.scripted import ScriptedSecondary

AT_ONCE = timedelta(microseconds=1)


async def forget(primary: AsyncEngine) -> None:
    """Forget all that may be forgotten, twice: a note goes after the events it is about."""
    async with raw(primary) as connection:
        for _ in range(2):
            await prune_events(connection, "public", AT_ONCE, 0)
            await prune_discarded(connection, "public", AT_ONCE)


async def test_a_superseded_event_that_another_secondary_keeps_is_still_told_as_given_up(primary: AsyncEngine) -> None:
    """The newer event that superseded it was for one secondary alone, as a backfill's is, and so is pruned first."""
    search, archive = ScriptedSecondary("search"), ScriptedSecondary("archive")
    search.always("1", Rejected("mapping"))
    manager = manager_of(primary, search, archive)
    await manager.register()
    async with primary.begin() as connection:
        token: SyncToken = await record(connection, [change("1", 1)])
    async with primary.begin() as connection:
        await record(connection, [change("1", 2)], backend_ids=["search"])
    await manager.relay().run_once("search")
    assert await manager.discard(Which("search"), reason="the test gives it up") == 1
    await forget(primary)
    assert await value(primary, "select count(*) from outbox") == 1, "the archive is owed the first event"
    answer = (await manager.wait_for_sync(token, timeout=0, backends=["search"]))["search"]
    assert (answer.state, answer.synced) == (SyncState.DISCARDED, False)


async def test_a_note_goes_once_no_event_is_left_that_it_stands_for(primary: AsyncEngine) -> None:
    search = ScriptedSecondary("search")
    search.always("1", Rejected("mapping"))
    manager = manager_of(primary, search)
    await manager.register()
    async with primary.begin() as connection:
        await record(connection, [change("1", 1), change("2", 1), change("1", 2)])
    await manager.relay().run_once("search")
    assert await manager.discard(Which("search"), reason="the test gives it up") == 1
    await forget(primary)
    assert await value(primary, "select count(*) from outbox_discarded") == 0
