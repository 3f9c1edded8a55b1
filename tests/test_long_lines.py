"""Log order: a key that fails may owe more than a row should hold, page by page; nothing of it is lost or passed."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Registration, SyncManager, SyncState, SyncToken, Which, record
from outbox.prune import fold
from outbox.secondaries.base import Rejected, Retry
from outbox.turn import take_turn
from tests.relaying import change, claim_on, execute, manager_of, pending, raw, rows, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

EVENTS, PAGE, BATCH = 100, 20, 7
PAGES = "select page, event_ids from outbox_hold where resource_id = 'long' order by page"


@pytest.fixture(autouse=True)
def short_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outbox.resume.PAGE", PAGE)


@pytest.fixture
async def archive() -> ScriptedSecondary:
    archive = ScriptedSecondary("archive")
    archive.always("long", Retry("not_now"))
    return archive


async def a_long_line(primary: AsyncEngine, archive: ScriptedSecondary, **settings: Any) -> SyncManager:
    """Return a manager whose archive refuses one key, of which a hundred events are owed by now."""
    # Whatever housekeeping would mend is broken here.
    terms = {"batch_size": BATCH, "max_attempts": 1_000_000, "retry_initial": 0.2, "retry_max": 0.4}
    settings = terms | {"prune_interval": 60} | settings
    manager = manager_of(primary, Registration(archive, ordering="log"), **settings)
    await manager.register()
    await write(manager, change("long", 0))
    async with running(manager.relay()):
        await eventually(lambda: archive.sent_to("long"))
        await write(manager, *(change("long", number) for number in range(1, EVENTS)))
        await eventually(lambda: nothing_waits(primary))
    return manager


async def nothing_waits(primary: AsyncEngine) -> bool:
    return await value(primary, "select count(*) from outbox_delivery") == 0


async def positions(primary: AsyncEngine) -> list[int]:
    return [row["event_id"] for row in await rows(primary, "select event_id from outbox order by event_id")]


async def test_it_lies_in_pages_and_is_owed_as_a_whole(primary: AsyncEngine, archive: ScriptedSecondary) -> None:
    manager = await a_long_line(primary, archive)
    pages = await rows(primary, PAGES)
    # Those that moved in meanwhile are missing.
    assert pages[0]["page"] == 0
    assert max(len(page["event_ids"]) for page in pages) <= PAGE + BATCH
    assert len(pages) >= EVENTS / (PAGE + BATCH)
    assert [position for page in pages for position in page["event_ids"]] == await positions(primary)
    assert await pending(primary, "archive") == EVENTS
    (failure,) = await manager.failures()
    assert failure.owed == EVENTS
    (status,) = await manager.all_statuses()
    assert (status.failing, status.dead) == (1, 0)


async def test_once_it_is_taken_it_arrives_in_order_and_leaves_nothing(
    primary: AsyncEngine, archive: ScriptedSecondary
) -> None:
    manager = await a_long_line(primary, archive)
    archive.heal("long")
    before = len(archive.history)
    # A hand that means well.
    await execute(primary, "update outbox_hold set next_attempt_at = now()")
    await write(manager, change("other"), change("long", EVENTS))
    async with running(manager.relay()):
        await eventually(lambda: nothing_owed(primary))
    arrived = [event.position for event in archive.history[before:] if event.resource_id == "long"]
    assert arrived == [each for each in await positions(primary) if each != other(archive)]
    assert await value(primary, "select count(*) from outbox_hold") == 0


async def somebody_is_blocked(primary: AsyncEngine) -> bool:
    return bool(await value(primary, "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"))


async def nothing_owed(primary: AsyncEngine) -> bool:
    return await pending(primary) == 0


def other(archive: ScriptedSecondary) -> int | None:
    (event,) = [event for event in archive.history if event.resource_id == "other"]
    return event.position


@pytest.mark.parametrize("again", [1, 5])
async def test_it_fails_on_its_way_and_nothing_passes(
    primary: AsyncEngine, archive: ScriptedSecondary, again: int
) -> None:
    """A page is half out when the next failure comes: what was not taken goes first again."""
    manager = await a_long_line(primary, archive, retry_initial=0.01, retry_max=0.02)
    archive.heal("long")
    archive.script("long", *[None, None, None, Retry("not_now"), None] * again * 4)
    before = len(archive.history)
    async with running(manager.relay()):
        await write(manager, *(change("long", EVENTS + number) for number in range(30)))
        await eventually(lambda: nothing_owed(primary))
    assert [event.position for event in archive.history[before:]] == await positions(primary)


async def test_what_joins_a_hold_as_its_last_event_goes_out_goes_next(
    primary: AsyncEngine, archive: ScriptedSecondary
) -> None:
    manager = manager_of(
        primary, Registration(archive, ordering="log"), prune_interval=60, retry_initial=60, retry_max=60
    )
    await manager.register()
    await write(manager, change("long"))
    async with running(manager.relay()):
        await eventually(lambda: failing(manager))
    archive.heal("long")
    await write(manager, *(change("long", number) for number in range(1, 5)))
    await execute(primary, "update outbox_hold set next_attempt_at = now()")
    async with running(manager.relay()):
        await eventually(lambda: nothing_owed(primary))
    assert [event.position for event in archive.history] == await positions(primary)
    assert await value(primary, "select count(*) from outbox_hold") == 0


async def failing(manager: SyncManager) -> bool:
    return bool(await manager.failures())


async def test_dead_it_waits_for_somebody_and_is_driven_again_as_a_whole(
    primary: AsyncEngine, archive: ScriptedSecondary
) -> None:
    archive.heal("long")
    archive.script("long", Rejected("malformed"))
    manager = await a_long_line(primary, archive)
    assert await manager.drained("archive") == 1
    before = len(archive.history)
    assert await manager.redrive(Which(state="dead")) == 1
    async with running(manager.relay()):
        await eventually(lambda: nothing_owed(primary))
    assert [event.position for event in archive.history[before:]] == await positions(primary)


async def test_given_up_it_is_given_up_as_a_whole_and_a_newer_event_is_carried(
    primary: AsyncEngine, archive: ScriptedSecondary
) -> None:
    manager = await a_long_line(primary, archive)
    given_up = await positions(primary)
    assert await manager.discard(Which(resource_id="long"), reason="not worth it") == 1
    assert await value(primary, "select count(*) from outbox_hold") == 0
    notes = await rows(primary, "select oldest_id, event_id, events from outbox_discarded")
    assert notes == [{"oldest_id": given_up[0], "event_id": given_up[-1], "events": EVENTS}]
    assert (await manager.backend_status("archive")).discarded == EVENTS
    archive.heal("long")
    async with primary.begin() as connection:
        token = await record(connection, change("long", EVENTS))
    async with running(manager.relay()):
        answer = await manager.wait_for_sync(token, timeout=timedelta(seconds=20))
    assert answer["archive"].state is SyncState.APPLIED


@pytest.mark.parametrize("which", [0, EVENTS // 2, EVENTS - 1])
async def test_whoever_waits_for_any_of_it_is_told_that_it_fails(
    primary: AsyncEngine, archive: ScriptedSecondary, which: int
) -> None:
    manager = await a_long_line(primary, archive)
    position = (await positions(primary))[which]
    ((transaction, stamp),) = [
        (row["transaction"], row["stamp"])
        for row in await rows(primary, "select 1 as transaction, stamp from outbox where event_id = :at", at=position)
    ]
    token = SyncToken.of(transaction, stamp, [(position, ["archive"])])
    answer = await manager.wait_for_sync(token, timeout=0)
    assert answer["archive"].state is SyncState.FAILING


async def test_a_secondary_that_wants_the_newest_only_from_now_on_gets_the_newest(
    primary: AsyncEngine, archive: ScriptedSecondary
) -> None:
    await a_long_line(primary, archive)
    archive.heal("long")
    manager = manager_of(primary, Registration(archive, ordering="state"), batch_size=BATCH, prune_interval=60)
    await manager.register()
    before = len(archive.history)
    await write(manager, change("long", EVENTS))
    async with running(manager.relay()):
        await eventually(lambda: nothing_owed(primary))
    assert [event.position for event in archive.history[before:]] == (await positions(primary))[-1:]
    status = await manager.backend_status("archive")
    assert status.applied + status.superseded == EVENTS + 1
    assert await value(primary, "select count(*) from outbox_hold") == 0


async def test_pruning_keeps_all_of_it(primary: AsyncEngine, archive: ScriptedSecondary) -> None:
    await a_long_line(primary, archive, keep_events=0.001, prune_interval=0.02)
    assert len(await positions(primary)) == EVENTS


async def test_a_page_whose_hold_a_hand_removed_becomes_one(primary: AsyncEngine, archive: ScriptedSecondary) -> None:
    manager = await a_long_line(primary, archive)
    await execute(primary, "delete from outbox_hold where page < 2")
    left = [position for page in await rows(primary, PAGES) for position in page["event_ids"]]
    async with raw(primary) as connection:
        await fold(connection, "public", "archive")
    archive.heal("long")
    before = len(archive.history)
    async with running(manager.relay()):
        await eventually(lambda: nothing_owed(primary))
    assert [event.position for event in archive.history[before:]] == left


async def test_whoever_gives_up_waits_for_whoever_puts_something_behind_it(
    primary: AsyncEngine, archive: ScriptedSecondary
) -> None:
    """Else what was put there meanwhile would lie behind nothing."""
    manager = await a_long_line(primary, archive)
    await write(manager, *(change("long", EVENTS + number) for number in range(PAGE)))
    await execute(primary, "update outbox_hold set next_attempt_at = now() + interval '1 hour' where page = 0")
    async with raw(primary) as connection, connection.transaction():
        assert await claim_on(connection, "archive") is None
        giving_up = asyncio.create_task(manager.discard(Which(resource_id="long"), reason="not worth it"))
        await eventually(lambda: somebody_is_blocked(primary))
    assert await giving_up == 1
    assert await value(primary, "select count(*) from outbox_hold") == 0
    assert (await manager.backend_status("archive")).discarded == EVENTS + PAGE


@pytest.mark.parametrize("touch", ["discard", "redrive"])
async def test_a_claim_passes_by_whoever_touches_holds(
    primary: AsyncEngine, archive: ScriptedSecondary, touch: str
) -> None:
    """The claim would else wait for a hold with the turn in hand, and the other for the turn with the hold."""
    manager = await a_long_line(primary, archive)
    await write(manager, change("long", EVENTS))
    async with raw(primary) as last, last.transaction(), raw(primary) as connection:
        await last.execute("update outbox_hold set lost = lost where page = 0")
        which = Which(resource_id="long")
        touching = manager.redrive(which) if touch == "redrive" else manager.discard(which, reason="not worth it")
        task = asyncio.create_task(touching)
        await eventually(lambda: somebody_is_blocked(primary))
        async with connection.transaction():
            assert await take_turn(connection, "public", "archive") is None
    # A hold that changed meanwhile is asked once more, and still chosen.
    assert await task == 1


async def test_a_secondary_that_is_removed_takes_all_of_it_along(
    primary: AsyncEngine, archive: ScriptedSecondary
) -> None:
    manager = await a_long_line(primary, archive)
    removal = await manager.remove("archive", discard=True, reason="moved house")
    assert removal.held == EVENTS
    assert await value(primary, "select count(*) from outbox_hold") == 0
    assert await value(primary, "select sum(events) from outbox_discarded") == EVENTS
