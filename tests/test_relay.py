"""The relay: run_once, drain and run; sharing work; what the registry says; stopping."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox import Registration, SyncManager, UnknownSecondary
from outbox.secondaries.base import Retry
from outbox.turn import take_turn
from tests.relaying import (
    change,
    claim_by_hand,
    execute,
    hold_of,
    manager_of,
    pending,
    raw,
    running,
    value,
    write,
)
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually


async def one(primary: AsyncEngine, **settings: Any) -> tuple[ScriptedSecondary, SyncManager]:
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, **settings)
    await manager.register()
    return secondary, manager


async def nothing_owed(primary: AsyncEngine) -> bool:
    return await pending(primary) == 0


async def test_run_once_carries_one_batch_and_says_how_many(primary: AsyncEngine) -> None:
    """Superseded deliveries count too; 0 says that nothing was due."""
    secondary, manager = await one(primary, batch_size=3)
    await write(manager, change("1"), change("1"), change("2"), change("3"))
    relay = manager.relay()
    assert [await relay.run_once("search") for _ in range(3)] == [3, 1, 0]
    assert len(secondary.held) == 3


async def test_run_once_refuses_a_secondary_it_does_not_have(primary: AsyncEngine) -> None:
    """The error names those it has."""
    _, manager = await one(primary)
    with pytest.raises(UnknownSecondary, match="search"):
        await manager.relay().run_once("nobody")


async def test_drain_carries_all_secondaries_and_does_not_wait_for_retries(primary: AsyncEngine) -> None:
    """What waits for its next attempt is not due."""
    first, second = ScriptedSecondary("first"), ScriptedSecondary("second")
    manager = manager_of(primary, first, second, batch_size=4, retry_initial=600, retry_max=600)
    await manager.register()
    first.always("3", Retry("busy"))
    await write(manager, *(change(str(number)) for number in range(10)))
    assert await manager.relay().drain() == 20
    assert (len(first.held), len(second.held)) == (9, 10)
    assert await manager.relay().drain() == 0


async def test_drain_goes_on_after_it_took_over_a_lost_attempt(primary: AsyncEngine) -> None:
    """Its first claim only finds the loss; five fresh deliveries are due all the same."""
    secondary, manager = await one(primary, retry_initial=600, retry_max=600)
    await write(manager, change("lost"))
    assert await claim_by_hand(primary, "search")
    await write(manager, *(change(str(number)) for number in range(5)))
    assert await manager.relay().drain() == 5
    assert len(secondary.held) == 5


@pytest.mark.parametrize("ordering", ["state", "log"])
async def test_drain_goes_on_after_a_claim_that_only_fed_holds(primary: AsyncEngine, ordering: Any) -> None:
    """A batch full of later events of one failing key comes before the other key."""
    secondary = ScriptedSecondary("search")
    terms = Registration(secondary, ordering=ordering)
    manager = manager_of(primary, terms, batch_size=5, retry_initial=600, retry_max=600)
    await manager.register()
    secondary.always("failing", Retry("busy"))
    await write(manager, change("failing"))
    assert await manager.relay().drain() == 1
    await write(manager, *(change("failing", number) for number in range(12)), change("other"))
    await manager.relay().drain()
    assert secondary.sent_to("other")


async def test_drain_waits_for_its_turn(primary: AsyncEngine) -> None:
    """Another relay is claiming: that is not the end of what is due."""
    secondary, manager = await one(primary)
    await write(manager, *(change(str(number)) for number in range(5)))
    async with raw(primary) as connection, asyncio.TaskGroup() as group, connection.transaction():
        assert await take_turn(connection, "public", "search")
        draining = group.create_task(manager.relay().drain())
        await eventually(lambda: _has_session(primary))
        done, _ = await asyncio.wait({draining}, timeout=0.3)
        assert not done
    assert draining.result() == 5
    assert len(secondary.held) == 5


async def _has_session(primary: AsyncEngine) -> bool:
    sessions = "select count(*) from pg_stat_activity where datname = current_database()"
    return await value(primary, f"{sessions} and application_name = 'outbox relay'") > 0


async def test_two_drains_at_once_leave_nothing_due(primary: AsyncEngine) -> None:
    """Together they carry everything once."""
    secondary, manager = await one(primary, batch_size=5)
    other = manager_of(primary, secondary, batch_size=5)
    for _ in range(5):
        await write(manager, *(change(str(number)) for number in range(50)))
        counts = await asyncio.gather(manager.relay().drain(), other.relay().drain())
        assert sum(counts) == 50
        assert await pending(primary) == 0


async def test_run_once_may_be_called_for_two_secondaries_at_once(primary: AsyncEngine) -> None:
    """The first to come opens the connections for both."""
    first, second = ScriptedSecondary("first"), ScriptedSecondary("second")
    manager = manager_of(primary, first, second)
    await manager.register()
    await write(manager, change("1"))
    relay = manager.relay()
    assert await asyncio.gather(relay.run_once("first"), relay.run_once("second")) == [1, 1]


async def test_a_relay_on_a_database_without_tables_says_so_and_leaves_nothing_open(database: str) -> None:
    """No retrying of what no waiting mends; no session stays behind."""
    engine = create_async_engine(database)
    manager = manager_of(engine, ScriptedSecondary("search"))
    for call in (manager.relay().run, manager.relay().drain):
        with pytest.raises(Exception, match="outbox_secondary"):
            await call()
    sessions = "select count(*) from pg_stat_activity where datname = current_database() and application_name <> ''"
    await eventually(lambda: _is(engine, sessions, 0))
    await engine.dispose()


async def _is(engine: AsyncEngine, query: str, expected: int) -> bool:
    return await value(engine, query) == expected


async def test_two_relays_share_the_work(primary: AsyncEngine) -> None:
    """Each event is sent once, and both have their part in it."""
    secondary = ScriptedSecondary("search", pace=lambda: 0.02)
    managers = [manager_of(primary, secondary, batch_size=5, attempts_in_flight=2) for _ in range(2)]
    await managers[0].register()
    async with running(*(manager.relay() for manager in managers)):
        await write(managers[0], *(change(str(number)) for number in range(200)))
        await eventually(lambda: nothing_owed(primary))
    assert len(secondary.sent) == len(set(secondary.sent)) == 200
    assert await value(primary, "select count(distinct relay_id) from outbox_attempt") == 2


@pytest.mark.parametrize("status", ["paused", "removed"])
async def test_a_paused_or_removed_secondary_is_not_served(primary: AsyncEngine, status: str) -> None:
    """A paused one goes on being owed; when it is live again it gets everything."""
    secondary, other = ScriptedSecondary("search"), ScriptedSecondary("other")
    manager = manager_of(primary, secondary, other)
    await manager.register()
    await write(manager, change("before"))
    await execute(primary, "update outbox_secondary set status = :status where backend_id = 'search'", status=status)
    await write(manager, change("meanwhile"))
    relay = manager.relay()
    assert [await relay.run_once("search") for _ in range(3)] == [0, 0, 0]
    assert await relay.drain() == 2
    assert (secondary.calls, len(other.held)) == ([], 2)
    owed = 2 if status == "paused" else 1
    assert await pending(primary, "search") == owed
    await execute(primary, "update outbox_secondary set status = 'live'")
    assert await relay.drain() == owed
    assert len(secondary.held) == owed


async def test_a_draining_secondary_gets_what_it_was_owed_and_nothing_new(primary: AsyncEngine) -> None:
    """Design, registry."""
    secondary, manager = await one(primary)
    await write(manager, change("before"))
    await execute(primary, "update outbox_secondary set status = 'draining'")
    await write(manager, change("after"))
    assert await manager.relay().drain() == 1
    assert [event.resource_id for event in secondary.history] == ["before"]


async def test_a_pause_lets_what_is_in_hand_finish(primary: AsyncEngine) -> None:
    """B3: nothing is lost and no attempt is spent by pausing."""
    secondary, manager = await one(primary)
    await write(manager, change("1"))
    secondary.hang()
    async with running(manager.relay()):
        await eventually(lambda: secondary.running)
        await execute(primary, "update outbox_secondary set status = 'paused'")
        secondary.release()
        await eventually(lambda: nothing_owed(primary))
    assert len(secondary.sent) == 1


async def test_stopping_at_any_moment_spends_no_attempt(primary: AsyncEngine) -> None:
    """B3, S1: twelve times in the midst of work, in order or in a hurry; nothing stays open, nothing is lost."""
    secondary = ScriptedSecondary("search", pace=lambda: random.random() / 50)
    manager = manager_of(primary, secondary, batch_size=4, shutdown_grace=0.02)
    await manager.register()
    for round_ in range(12):
        await write(manager, *(change(str(number), round_) for number in range(60)))
        relay = manager.relay()
        running_relay = asyncio.create_task(relay.run())
        least = len(secondary.calls) + random.randint(1, 8)
        await eventually(lambda least=least: len(secondary.calls) >= least)
        relay.stop(at_once=round_ % 2 == 0)
        await asyncio.wait_for(running_relay, timeout=10)
        assert await value(primary, "select count(*) from outbox_attempt where finished_at is null") == 0
    assert await value(primary, "select sum(lost + retried) from outbox_attempt") == 0
    assert await value(primary, "select coalesce(max(attempts), 0) from outbox_hold") == 0
    await eventually(manager.relay().drain)
    await eventually(lambda: nothing_owed(primary))


async def test_a_cancelled_run_hands_back_what_it_had(primary: AsyncEngine) -> None:
    """B8, B3: cancellation comes through at once, and no attempt is spent."""
    secondary, manager = await one(primary, shutdown_grace=60)
    await write(manager, change("1"))
    secondary.hang()
    running_relay = asyncio.create_task(manager.relay().run())
    await eventually(lambda: secondary.running)
    running_relay.cancel()
    done, _ = await asyncio.wait({running_relay}, timeout=5)
    assert done
    assert running_relay.cancelled()
    hold = await hold_of(primary, "1")
    assert hold is not None
    assert (hold["state"], hold["attempts"]) == ("released", 0)
    assert await value(primary, "select released from outbox_attempt") == 1


async def test_a_relay_starts_while_another_sits_on_the_registry(primary: AsyncEngine) -> None:
    """A relay that was paused inside a claim keeps its secondary's row locked: nobody who starts waits for it."""
    manager = manager_of(primary, ScriptedSecondary("search"))
    await manager.register()
    async with raw(primary) as paused, paused.transaction():
        await paused.execute("select from outbox_secondary for no key update")
        async with asyncio.timeout(5):
            await manager.register()


async def test_a_cancelled_run_leaves_nothing_running_beside_it(primary: AsyncEngine) -> None:
    """B8: nor its housekeeping, which would find the connections closed."""
    manager = manager_of(primary, ScriptedSecondary("search"), prune_interval=0.05)
    before = asyncio.all_tasks()
    relaying = asyncio.create_task(manager.relay().run())
    await eventually(lambda: any("keep_tidy" in repr(task) for task in asyncio.all_tasks() - before))
    relaying.cancel()
    await asyncio.wait([relaying])
    assert [task for task in asyncio.all_tasks() - before if "keep_tidy" in repr(task)] == []
