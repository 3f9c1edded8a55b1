"""What an operator does about failures and secondaries (D4, D52, U16, B6, O8)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Registration, SettingsError, SyncEvent, SyncManager, SyncState, SyncToken, UnknownSecondary, Which
from outbox.secondaries.base import Rejected, Retry
from tests.relaying import change, execute, hold_of, manager_of, pending, rows, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually


async def one(primary: AsyncEngine, **settings: Any) -> tuple[ScriptedSecondary, SyncManager]:
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, **settings)
    await manager.register()
    return secondary, manager


async def written(manager: SyncManager, *events: SyncEvent) -> SyncToken:
    async with manager.session() as session:
        session.record(*events)
        await session.commit()
        assert session.token is not None
        return session.token


async def test_what_is_dead_is_listed_and_tried_again_when_told_to(primary: AsyncEngine) -> None:
    """D4, U16: with its error, attempts and times; a redrive has all attempts before it."""
    secondary, manager = await one(primary, max_attempts=2)
    secondary.always("1", Retry("busy", "no room"))
    secondary.always("2", Rejected("malformed", "no such field"))
    await write(manager, change("1"), change("2"), change("3"))
    async with running(manager.relay()):
        await eventually(lambda: value(primary, "select count(*) = 2 from outbox_hold where state = 'dead'"))
    found = {each.resource_id: each for each in await manager.failures()}
    assert {name: (each.state, each.attempts, each.error_code, each.error) for name, each in found.items()} == {
        "1": ("dead", 2, "busy", "no room"),
        "2": ("dead", 1, "malformed", "no such field"),
    }
    assert all(each.first_failed_at and each.last_failed_at for each in found.values())
    assert await manager.redrive(Which(error_code="busy"), dry_run=True) == 1
    assert (await hold_of(primary, "1") or {})["state"] == "dead", "a dry run changed something"
    secondary.heal("1")
    assert await manager.redrive(Which(error_code="busy")) == 1
    await manager.relay().drain()
    assert secondary.content_of("Thing", "1") == '{"value":0}'
    assert [each.resource_id for each in await manager.failures()] == ["2"]
    secondary.heal("2")
    assert await manager.redrive() == 1
    await manager.relay().drain()
    assert await manager.failures() == []
    assert await pending(primary, "search") == 0


@pytest.mark.parametrize(
    ("which", "names"),
    [
        (Which(), {"a", "b", "c", "d"}),
        (Which(backend_id="search"), {"a", "b", "c", "d"}),
        (Which(backend_id="other"), set()),
        (Which(tenant_id="acme"), {"d"}),
        (Which(resource_type="Thing", resource_id="a"), {"a"}),
        (Which(state="dead"), {"b", "c", "d"}),
        (Which(state="retrying"), {"a"}),
        (Which(error_code="malformed", state="dead"), {"b", "d"}),
    ],
)
async def test_only_what_matches_everything_given_is_touched(
    primary: AsyncEngine, which: Which, names: set[str]
) -> None:
    secondary, manager = await one(primary, retry_initial=600, retry_max=600)
    secondary.always("a", Retry("busy"))
    secondary.always("b", Rejected("malformed"))
    secondary.always("c", Rejected("forbidden"))
    secondary.always("d", Rejected("malformed"))
    await write(manager, change("a"), change("b"), change("c"), change("d", tenant="acme"))
    await manager.relay().drain()
    assert await manager.redrive(which, dry_run=True) == len(names)
    assert await manager.redrive(which) == len(names)
    due = await rows(primary, "select resource_id from outbox_hold where state = 'released'")
    assert {row["resource_id"] for row in due} == names


async def test_what_an_attempt_has_in_hand_is_left_to_it(primary: AsyncEngine) -> None:
    """B6: neither tried twice at once nor given up under the hands of a relay."""
    secondary, manager = await one(primary, retry_initial=0.01, retry_max=0.01)
    secondary.script("1", Retry("busy"))
    await write(manager, change("1"))
    assert await manager.relay().run_once("search") == 1
    secondary.hang()
    async with running(manager.relay()):
        await eventually(lambda: secondary.running)
        assert await manager.redrive() == 0
        assert await manager.discard(Which(), reason="never mind") == 0
        secondary.release()
        await eventually(lambda: value(primary, "select count(*) = 0 from outbox_hold"))
    assert len(secondary.history) == 1


@pytest.mark.parametrize("ordering", ["state", "log"])
async def test_what_was_given_up_is_counted_noted_and_never_called_synced(primary: AsyncEngine, ordering: Any) -> None:
    """D4, D40, guarantees 2 and 10: also what the newest event stood for, also after a newer one of the key arrived."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, Registration(secondary, ordering=ordering))
    await manager.register()
    secondary.always("1", Rejected("malformed"))
    tokens = [await written(manager, change("1", number)) for number in range(3)]
    await manager.relay().drain()
    waiting = asyncio.create_task(manager.wait_for_sync(await written(manager, change("2")), timeout=0.1))
    assert await manager.discard(Which(resource_id="1"), reason="the ward was closed", dry_run=True) == 1
    assert await manager.discard(Which(resource_id="1"), reason="the ward was closed") == 1
    await waiting
    for token in tokens:
        result = await manager.wait_for_sync(token, timeout=0)
        assert (result["search"].state, bool(result)) == (SyncState.DISCARDED, False)
    secondary.heal("1")
    newer = await written(manager, change("1", 9))
    await manager.relay().drain()
    assert await manager.wait_for_sync(newer, timeout=0)
    assert secondary.content_of("Thing", "1") == '{"value":9}'
    for token in tokens:
        assert not await manager.wait_for_sync(token, timeout=0)
    status = await manager.backend_status("search")
    expected = 1 if ordering == "state" else 3
    assert (status.pending, status.discarded, status.dead) == (0, expected, 0)
    done = status.applied + status.stale + status.superseded + status.discarded
    assert done == await value(primary, "select count(*) from outbox") == 5
    (note,) = await rows(primary, "select reason, error_code, attempts, events from outbox_discarded")
    assert note == {"reason": "the ward was closed", "error_code": "malformed", "attempts": 1, "events": expected}


async def test_a_note_outlives_its_event_and_is_pruned_in_the_end(primary: AsyncEngine) -> None:
    secondary, manager = await one(primary, keep_events=0.001, keep_attempts=0.5)
    secondary.always("1", Rejected("malformed"))
    await write(manager, change("1"))
    await manager.relay().drain()
    await manager.discard(Which(), reason="never mind")
    async with running(manager.relay()):
        await eventually(lambda: value(primary, "select count(*) = 0 from outbox"))
        await eventually(lambda: value(primary, "select count(*) = 0 from outbox_discarded"))
    assert (await manager.backend_status("search")).discarded == 1


async def test_a_note_is_kept_while_somebody_may_ask_about_its_event(primary: AsyncEngine) -> None:
    """Guarantee 10: events may be kept for longer than notes."""
    secondary, manager = await one(primary, keep_events=3600, keep_attempts=0.001)
    secondary.always("1", Rejected("malformed"))
    token = await written(manager, change("1"))
    await manager.relay().drain()
    await manager.discard(Which(), reason="never mind")
    async with running(manager.relay()):
        await asyncio.sleep(1)
        assert (await manager.wait_for_sync(token, timeout=0))["search"].state is SyncState.DISCARDED


@pytest.mark.parametrize("reason", ["", "x" * 1_025, "a\nb", "\x00"])
async def test_a_reason_that_cannot_be_noted_is_refused(primary: AsyncEngine, reason: str) -> None:
    secondary, manager = await one(primary)
    secondary.always("1", Rejected("malformed"))
    await write(manager, change("1"))
    await manager.relay().drain()
    with pytest.raises(SettingsError, match="reason"):
        await manager.discard(Which(), reason=reason)
    assert await pending(primary, "search") == 1


async def test_a_paused_secondary_keeps_what_it_is_owed_until_it_goes_on(primary: AsyncEngine) -> None:
    """D52: nothing is carried, nothing is lost, and whoever waits is told."""
    secondary, manager = await one(primary)
    await manager.pause("search")
    await manager.pause("search")
    async with running(manager.relay()):
        token = await written(manager, change("1"))
        assert (await manager.wait_for_sync(token, timeout=5))["search"].state is SyncState.PAUSED
        assert (secondary.calls, await pending(primary, "search")) == ([], 1)
        await manager.resume("search")
        assert await manager.wait_for_sync(token, timeout=10)
    for call in (manager.pause, manager.resume):
        with pytest.raises(UnknownSecondary):
            await call("nobody")
    await execute(primary, "update outbox_secondary set status = 'removed'")
    with pytest.raises(UnknownSecondary):
        await manager.resume("search")


async def test_an_old_dead_event_that_is_replayed_after_a_newer_one_changes_nothing(primary: AsyncEngine) -> None:
    """O8: the newer full state has superseded it; there is nothing left to replay."""
    secondary, manager = await one(primary)
    secondary.script("1", Rejected("malformed"))
    await write(manager, change("1", 3))
    await manager.relay().drain()
    await write(manager, change("1", 4))
    await manager.relay().drain()
    assert await manager.redrive() == 0
    await manager.relay().drain()
    assert secondary.content_of("Thing", "1") == '{"value":4}'
