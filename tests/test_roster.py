"""Secondaries that come and go: what their status means to whoever writes, waits, reads, carries and looks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import (
    Registration,
    Rejected,
    Removal,
    StillOwed,
    SyncEvent,
    SyncManager,
    SyncMode,
    SyncState,
    SyncToken,
    Unavailable,
    UnknownSecondary,
    record,
)
from outbox.retire import retire
from outbox.settled import settled
from tests.relaying import change, claim_by_hand, execute, manager_of, pending, raw, rows, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

STATUS = "select (select status from outbox_secondary where backend_id = 'live')"
BREAKER = "select breaker <> 'closed' from outbox_secondary where backend_id = 'shadow'"
FILLED = """
    insert into outbox_backfill (backend_id, tenant_id, resource_type, finished_at) values ('live', 't', 'T', now())
"""


async def two(primary: AsyncEngine, **settings: Any) -> tuple[ScriptedSecondary, ScriptedSecondary, SyncManager]:
    """A live secondary and a shadow."""
    live, shadow = ScriptedSecondary("live"), ScriptedSecondary("shadow")
    manager = manager_of(primary, live, Registration(shadow, shadow=True), **settings)
    await manager.register()
    return live, shadow, manager


async def written(manager: SyncManager, *events: SyncEvent) -> SyncToken:
    async with manager.session() as session:
        session.record(*events)
        await session.commit()
        assert session.token is not None
        return session.token


async def status_of(manager: SyncManager, backend_id: str) -> str:
    return (await manager.backend_status(backend_id)).status


async def accounted(manager: SyncManager, backend_id: str) -> int:
    """How many deliveries ended in some way, and no way twice."""
    status = await manager.backend_status(backend_id)
    assert status.pending == 0
    return status.applied + status.stale + status.superseded + status.discarded


async def test_a_shadow_gets_every_event_and_nobody_waits_for_it_reads_it_or_is_alarmed_by_it(
    primary: AsyncEngine,
) -> None:
    """D7: it is filled beside the others, and is told with what is wrong with it."""
    _, shadow, manager = await two(primary, mode=SyncMode.SYNCHRONOUS, unhealthy_after_silence="off")
    shadow.down = Unavailable("refused", "on purpose")
    async with running(manager.relay()):
        statuses = {each.backend_id: each.state for each in await manager.sync(change("1"), timeout=20)}
        assert statuses == {"live": SyncState.APPLIED, "shadow": SyncState.ACCEPTED}
        token = await written(manager, change("2"))
        result = await manager.wait_for_sync(token, timeout=20)
        assert result
        assert [each.backend_id for each in result] == ["live"]
        assert not await manager.wait_for_sync(token, timeout=0, backends=["shadow"])
        assert await manager.may_read("live", token, max_lag=20)
        assert not await manager.may_read("shadow", token, max_lag=0)
        assert not await manager.may_read("shadow", max_lag=0)
        await eventually(lambda: value(primary, BREAKER))
        health = await manager.health()
        assert health.ok
        (told,) = [each for each in health.secondaries if each.backend_id == "shadow"]
        assert (told.status, told.healthy) == ("shadow", False)
        shadow.down = None
        assert await manager.wait_for_sync(token, timeout=20, backends=["shadow"])
        assert not await manager.may_read("shadow", token), "it has this, and of what was before nobody knows"
        await manager.drained("shadow")
        assert not await manager.may_read("shadow")
    assert b'outbox_status{backend="shadow",state="shadow"} 1.0' in await manager.metrics()
    await manager.promote("shadow")
    await manager.promote("shadow")
    assert await manager.may_read("shadow", token)
    assert await status_of(manager, "shadow") == "live"


async def test_a_promoted_secondary_is_not_made_a_shadow_by_its_registration(primary: AsyncEngine) -> None:
    _, _, manager = await two(primary)
    await manager.promote("shadow")
    await manager.register()
    assert await status_of(manager, "shadow") == "live"
    for backend_id, status in (("nobody", "live"), ("live", "paused"), ("live", "draining"), ("live", "removed")):
        await execute(primary, "update outbox_secondary set status = :status where backend_id = 'live'", status=status)
        with pytest.raises(UnknownSecondary):
            await manager.promote(backend_id)


async def test_a_draining_secondary_is_owed_nothing_new_and_gets_what_it_is_owed(primary: AsyncEngine) -> None:
    """D7, also for a transaction that does not know it yet."""
    live, shadow, manager = await two(primary)
    await write(manager, change("1"))
    async with raw(primary) as late:
        writing = late.transaction()
        await writing.start()
        await record(late, change("late"))
        draining = asyncio.create_task(manager.drain("live"))
        await eventually(lambda: value(primary, f"{STATUS} = 'draining'"))
        await write(manager, change("2"))
        assert not draining.done(), "it could still be owed something"
        await writing.commit()
        await draining
    assert await pending(primary, "live") == 2
    async with running(manager.relay()):
        assert await manager.drained("live") == 0
        await eventually(lambda: len(shadow.held) == 3)
    assert not await manager.may_read("live"), "it is owed nothing, and misses what is written"
    assert not await manager.may_read("live", await written(manager, change("3")))
    assert sorted(name for _, _, name in live.held) == ["1", "late"]
    assert await pending(primary, "live") == 0
    with pytest.raises(UnknownSecondary):
        await manager.drain("nobody")


async def test_what_is_dead_is_not_waited_for(primary: AsyncEngine) -> None:
    live, _, manager = await two(primary)
    live.always("1", Rejected("malformed"))
    await write(manager, change("1"), change("2"))
    async with running(manager.relay()):
        assert await manager.drained("live") == 1
    with pytest.raises(StillOwed, match="1 of its keys are dead"):
        await manager.remove("live")
    assert await status_of(manager, "live") == "live", "a refusal changed something"


async def test_a_secondary_that_is_owed_something_is_not_removed_unless_that_is_given_up(primary: AsyncEngine) -> None:
    """D7: it is retired explicitly; whoever waits is told the truth, and the counts add up."""
    live, shadow, manager = await two(primary, keep_events=0.001, prune_interval=0.05)
    live.script("dead", Rejected("malformed"))
    done = await written(manager, change("done"))
    dead = await written(manager, change("dead"))
    await manager.relay().drain()
    assert await claim_by_hand(primary, "live") is None
    in_hand = await written(manager, *(change(f"hand-{number}") for number in range(3)))
    assert await claim_by_hand(primary, "live") is not None
    waiting = await written(manager, *(change("waiting", number) for number in range(4)))
    with pytest.raises(StillOwed):
        await manager.remove("live")
    assert await manager.remove("live", discard=True, dry_run=True) == Removal("live", 3, 0, 5)
    assert await status_of(manager, "live") == "live", "a dry run changed something"
    assert await manager.remove("live", discard=True, reason="moved house") == Removal("live", 3, 1, 4)
    assert await manager.remove("live") == Removal("live")
    status = await manager.backend_status("live")
    assert (status.status, status.pending, status.in_flight, status.dead, status.healthy) == ("removed", 0, 0, 0, True)
    assert await accounted(manager, "live") == await value(primary, "select count(*) from outbox") == 9
    for token, state in ((done, SyncState.APPLIED), *((each, SyncState.REMOVED) for each in (dead, in_hand, waiting))):
        assert (await manager.wait_for_sync(token, timeout=0, backends=["live"]))["live"].state in (
            state,
            SyncState.SUPERSEDED,
        )
    notes = await rows(primary, "select distinct reason from outbox_discarded")
    assert notes == [{"reason": "moved house"}]
    # Retention waits for it no longer.
    async with running(manager.relay()):
        await eventually(lambda: value(primary, "select count(*) = 0 from outbox"))
    assert len(shadow.held) == 6


async def test_a_relay_that_runs_stops_carrying_at_its_next_poll_and_settles_nothing(primary: AsyncEngine) -> None:
    """D7: what it has in hand is written off; its late answer changes nothing, and it goes on with the others."""
    live, shadow, manager = await two(primary)
    live.hang()
    async with running(manager.relay()):
        token = await written(manager, change("1"), change("2"))
        await eventually(lambda: live.running)
        assert (await manager.remove("live", discard=True)).given_up == 2
        before = await value(primary, "select count(*) from outbox_attempt where backend_id = 'live'")
        calls = len(live.calls)
        live.release()
        await write(manager, change("3"))
        await eventually(lambda: len(shadow.held) == 3)
        assert (await manager.wait_for_sync(token, timeout=0, backends=["live"]))["live"].state is SyncState.REMOVED
        assert await value(primary, "select count(*) from outbox_attempt where backend_id = 'live'") == before
    assert len(live.calls) == calls
    assert await accounted(manager, "live") == 2


@pytest.mark.parametrize(("ordering", "owed"), [("log", 5), ("state", 1)])
async def test_a_key_that_is_in_hand_and_held_is_noted_from_its_oldest_event_on(
    primary: AsyncEngine, ordering: Literal["log", "state"], owed: int
) -> None:
    """Guarantee 10: only the hold knows what the event in hand supersedes, or what did not fit into the attempt."""
    slow = ScriptedSecondary("slow")
    manager = manager_of(primary, Registration(slow, ordering=ordering), batch_size=2 if ordering == "log" else 100)
    await manager.register()
    slow.script("1", Unavailable("refused", "on purpose"))
    tokens = [await written(manager, change("1", number)) for number in range(5)]
    await manager.relay().run_once("slow")
    assert await pending(primary, "slow") == owed
    await execute(primary, "update outbox_hold set next_attempt_at = now()")
    assert await claim_by_hand(primary, "slow", batch_size=2) is not None
    removal = await manager.remove("slow", discard=True)
    assert (removal.given_up, removal.in_hand > 0) == (owed, True)
    for token in tokens:
        assert (await manager.wait_for_sync(token, timeout=0))["slow"].state is SyncState.REMOVED
    assert await accounted(manager, "slow") == 5


async def test_a_writer_that_does_not_know_of_the_removal_leaves_nothing_behind(primary: AsyncEngine) -> None:
    """D7, G2: its deliveries commit after the status, and are written off all the same."""
    _, _, manager = await two(primary)
    async with raw(primary) as late:
        writing = late.transaction()
        await writing.start()
        await record(late, change("late"))
        removing = asyncio.create_task(manager.remove("live", discard=True))
        await eventually(lambda: value(primary, f"{STATUS} = 'removed'"))
        await asyncio.wait({removing}, timeout=0.5)
        assert not removing.done(), "something could still be left behind"
        await writing.commit()
        assert (await removing).given_up == 1
    assert await pending(primary, "live") == 0


async def test_a_writer_that_is_late_keeps_its_event_when_nothing_may_be_given_up(primary: AsyncEngine) -> None:
    """D7: what nobody allowed to give up is refused, also when it comes in between."""
    live, _, manager = await two(primary)
    async with raw(primary) as late:
        writing = late.transaction()
        await writing.start()
        await record(late, change("late"))
        removing = asyncio.create_task(manager.remove("live"))
        await eventually(lambda: value(primary, f"{STATUS} = 'draining'"))
        await writing.commit()
        with pytest.raises(StillOwed):
            await removing
    await manager.relay().drain()
    assert await manager.remove("live") == Removal("live")
    assert live.content_of("Thing", "late") is not None


async def test_a_removed_secondary_comes_back_as_a_shadow_but_not_by_a_relay_that_starts(primary: AsyncEngine) -> None:
    """D7: a restart with an old configuration undoes nothing; it missed events, so its backfill begins anew."""
    _, _, manager = await two(primary)
    await execute(primary, FILLED)
    await manager.remove("live")
    assert await rows(primary, "select * from outbox_backfill") == []
    await manager.relay().drain()
    assert await status_of(manager, "live") == "removed"
    await write(manager, change("1"))
    assert await pending(primary, "live") == 0
    await manager.register()
    assert await status_of(manager, "live") == "shadow"
    await write(manager, change("2"))
    assert await pending(primary, "live") == 1


async def test_a_removal_that_is_cut_off_keeps_nothing_of_the_backfill(
    primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D7, K4: it is cut off while it waits for the writers, and the secondary comes back without another removal."""
    _, _, manager = await two(primary)
    await execute(primary, FILLED)

    async def cut_off(*_: Any) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr("outbox.roster.settled", cut_off)
    with pytest.raises(asyncio.CancelledError):
        await manager.remove("live", discard=True)
    await manager.register()
    assert await status_of(manager, "live") == "shadow"
    assert await rows(primary, "select * from outbox_backfill") == []


async def test_nothing_is_written_off_of_one_that_came_back_meanwhile(primary: AsyncEngine) -> None:
    """D7: the removal was still under way."""
    _, _, manager = await two(primary)
    await manager.remove("live")
    await manager.register()
    await write(manager, change("1"))
    assert await retire(primary, "public", "live", "too late") == Removal("live")
    assert await pending(primary, "live") == 1


async def test_more_than_a_page_is_written_off(primary: AsyncEngine) -> None:
    """G5: a page is one short transaction."""
    _, _, manager = await two(primary)
    for start in range(0, 2_500, 500):
        await write(manager, *(change(str(number)) for number in range(start, start + 500)))
    assert (await manager.remove("live", discard=True)).given_up == 2_500
    assert await value(primary, "select count(distinct cast(xmin as text)) >= 3 from outbox_discarded")
    assert await accounted(manager, "live") == 2_500


@pytest.mark.parametrize("repeatable", [False, True], ids=["recorded", "snapshot"])
async def test_settled_waits_for_those_who_ran_and_for_nobody_else(primary: AsyncEngine, repeatable: bool) -> None:
    """D7, G2, D4: who recorded, and who may still record by an old snapshot; later ones are not waited for."""
    await two(primary)
    told: list[Sequence[int]] = []
    level = "REPEATABLE READ" if repeatable else "READ COMMITTED"
    async with primary.connect() as old, raw(primary) as later:
        await old.execution_options(isolation_level=level)
        if repeatable:
            await old.exec_driver_sql("select 1")
        else:
            await old.exec_driver_sql("delete from outbox where event_id = 0")
        waiting = asyncio.create_task(settled(primary, "public", told.append))
        await eventually(lambda: told)
        await later.execute("begin")
        await record(later, change("later"))
        assert not waiting.done()
        await old.rollback()
        await asyncio.wait_for(waiting, 20)
        assert len(told[0]) == 1


async def test_settled_waits_for_no_reader_that_keeps_nothing(primary: AsyncEngine) -> None:
    """D4: a transaction that sits idle in read committed, with no cursor open, records by what is then."""
    async with raw(primary) as idle, idle.transaction():
        await idle.execute("select count(*) from outbox")
        await asyncio.wait_for(settled(primary, "public"), 20)
