"""Promise 7: an event that kills its relay ends alone and dead; a noisy tenant has a bounded effect."""

from __future__ import annotations

import random
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Registration, SyncManager
from outbox.secondaries.base import Rejected, Retry
from tests.relay_process import RelayProcess, effects_in, told
from tests.relaying import change, dsn_of, execute, hold_of, manager_of, pending, rows, running, value, write
from tests.scripted import Call, CheckedSecondary, Hang, ScriptedSecondary
from tests.waiting import eventually

NOISY = 20_000
# As recording does it, for many at once.
FLOOD = """
with event as (
    insert into outbox (tenant_id, resource_type, resource_id, operation, content)
    select cast(:tenant as text), 'Thing', cast(number as text), 'update', '{}'
    from generate_series(1, cast(:many as integer)) as number
    returning event_id, tenant_id, resource_type, resource_id
)
insert into outbox_delivery (backend_id, lane, event_id, key_hash)
select secondary.backend_id, hashtextextended(tenant_id, 0) & 63, event_id,
       hashtextextended(tenant_id || '/' || resource_type || '/' || resource_id, 0)
from event cross join outbox_secondary as secondary
"""


async def test_an_event_that_kills_its_process_ends_alone_and_dead(
    primary: AsyncEngine, database: str, tmp_path: Path
) -> None:
    """F5: started again each time, the relay dies until the event has spent its attempts; all others arrive."""
    secondary = ScriptedSecondary("effects")
    manager = manager_of(primary, secondary)
    await manager.register()
    await write(manager, *(change(str(number)) for number in range(30)), told("deadly", "exit"))
    starts = 0
    async with effects_in(database) as effects:
        while await pending(primary) > await _dead(primary):
            starts += 1
            with RelayProcess(dsn_of(primary), effects.dsn, tmp_path / "log", max_attempts=3, lease=1) as relay:
                await eventually(lambda relay=relay: _died_or_done(primary, relay))
        assert await _dead(primary) == 1, "it took others with it"
        assert len(await effects.held()) == 30
        deaths = await effects.asked("deadly")
    assert len(deaths) == 3
    assert starts <= 4
    hold = await hold_of(primary, "deadly")
    assert hold is not None
    assert (hold["attempts"], hold["lost"], hold["error_code"]) == (3, 3, "lost")
    with_it = "select * from outbox_attempt where event_ids && cast(:owed as bigint[]) order by attempt_id"
    sizes = [len(row["event_ids"]) for row in await rows(primary, with_it, owed=hold["event_ids"])]
    assert sizes[0] > 1, "nobody was beside it, so this shows nothing"
    assert sizes[2:] == [1], "after two losses it is dispatched with nobody beside it"


async def _dead(primary: AsyncEngine) -> int:
    return await value(primary, "select count(*) from outbox_hold where state = 'dead'")


async def _died_or_done(primary: AsyncEngine, relay: RelayProcess) -> bool:
    return relay.code == 70 or await pending(primary) == await _dead(primary)


async def test_an_event_that_hangs_its_secondary_is_tried_again_with_nobody_beside_it(primary: AsyncEngine) -> None:
    """F5: the secondary answers when asked, so the batch is to blame; each of it is tried alone, all but one arrive."""
    secondary = CheckedSecondary("search")
    manager = manager_of(primary, secondary, lease=1.2, attempt_deadline=0.45, max_attempts=3)
    await manager.register()
    await write(manager, *(change(str(number)) for number in range(5)), change("hanging"))
    secondary.always("hanging", Hang())
    async with running(manager.relay()):
        await eventually(lambda: len(secondary.held) == 5)
        await eventually(lambda: _is(primary, "hanging", "dead"))
    assert [len(call.events) for call in secondary.calls_with("hanging")] == [6, 1, 1]
    hold = await hold_of(primary, "hanging")
    assert hold is not None
    assert (hold["attempts"], hold["error_code"]) == (3, "timeout")


async def _is(primary: AsyncEngine, resource_id: str, state: str) -> bool:
    hold = await hold_of(primary, resource_id)
    return hold is not None and hold["state"] == state


async def test_while_a_suspect_is_out_its_relay_has_nothing_else_out(primary: AsyncEngine) -> None:
    """F5: what may kill the process must find no other attempt in it that would be lost with it."""
    secondary = ScriptedSecondary("search", pace=lambda: 0.03)
    manager = manager_of(primary, secondary, batch_size=2, attempts_in_flight=4, retry_initial=600, retry_max=600)
    await manager.register()
    suspects = [f"suspect-{number}" for number in range(3)]
    for name in suspects:
        secondary.script(name, Retry("busy"))
    await write(manager, *(change(name) for name in suspects))
    for _ in range(2):
        await manager.relay().run_once("search")
    await execute(primary, "update outbox_hold set alone = true, lost = 2, next_attempt_at = now()")
    await write(manager, *(change(str(number)) for number in range(60)))
    async with running(manager.relay()):
        await eventually(lambda: len(secondary.held) == 63)
    for name in suspects:
        alone = secondary.calls_with(name)[-1]
        assert alone.names == [name]
        beside = [call.names for call in secondary.calls if _at_once(call, alone)]
        assert beside == [[name]]


async def test_the_last_suspect_leaves_nothing_that_keeps_others_from_going_out(primary: AsyncEngine) -> None:
    """Promise 7: once no suspect is left a batch that hangs delays only itself."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary)
    await manager.register()
    await _hold(primary, manager, secondary, "suspect")
    await execute(primary, "update outbox_hold set alone = true, lost = 2, next_attempt_at = now()")
    secondary.always("slow", Hang())
    async with running(manager.relay()):
        await eventually(lambda: _owes(primary, 0))
        await write(manager, change("slow"))
        await eventually(lambda: secondary.running)
        await write(manager, change("other"))
        await eventually(lambda: secondary.sent_to("other"), timedelta(seconds=5))
        assert [call.names for call in secondary.running] == [["slow"]]


async def _hold(primary: AsyncEngine, manager: SyncManager, secondary: ScriptedSecondary, name: str) -> None:
    """Let one resource be held back, due in an hour."""
    secondary.script(name, Retry("busy"))
    await write(manager, change(name))
    await manager.relay().run_once(secondary.backend_id)
    later = "update outbox_hold set next_attempt_at = now() + interval '1 hour' where resource_id = :name"
    await execute(primary, later, name=name)


async def _owes(primary: AsyncEngine, deliveries: int) -> bool:
    return await pending(primary) == deliveries


async def test_suspects_and_all_that_is_held_go_on_beside_a_backlog(primary: AsyncEngine) -> None:
    """Promise 7: with always something in hand, in a bounded number of batches; a suspect still finds nobody."""
    secondary = CheckedSecondary("search", pace=lambda: random.uniform(0.03, 0.07))
    terms: dict[str, Any] = {"batch_size": 10, "attempts_in_flight": 4, "retry_initial": 600, "retry_max": 600}
    short = manager_of(primary, secondary, **terms, lease=1.2, attempt_deadline=0.5)
    await short.register()
    suspects = [f"suspect-{number}" for number in range(3)]
    secondary.script(suspects[0], Hang())
    secondary.script("held", Retry("busy"))
    secondary.script("dead", Rejected("no"))
    for batch in (suspects, ["held", "dead"]):
        await write(short, *(change(name) for name in batch))
        await short.relay().run_once("search")
    assert await value(primary, "select count(*) from outbox_hold where alone") == len(suspects)
    await execute(primary, "update outbox_hold set next_attempt_at = now() where state = 'retrying'")
    await execute(primary, FLOOD, tenant="noisy", many=NOISY)
    await write(short, change("dead", 1))
    already = len(secondary.calls)
    async with running(manager_of(primary, secondary, **terms).relay()):
        names = {"held", "dead", *suspects}
        await eventually(lambda: names <= {event.resource_id for event in secondary.history})
        assert await pending(primary) > NOISY // 4, "the backlog was done, so this shows nothing"
    went = {name: secondary.calls.index(secondary.calls_with(name)[-1]) - already for name in names}
    assert max(went["held"], went["dead"]) < 100, went
    assert max(went.values()) < 400, went
    for name in suspects:
        alone = secondary.calls_with(name)[-1]
        assert [call.names for call in secondary.calls if call.finished and _at_once(call, alone)] == [[name]]
    turns = sorted(went[name] for name in suspects)
    assert all(later - earlier > 4 for earlier, later in pairwise(turns)), f"they left the others no time: {went}"


@pytest.mark.parametrize("slots", [1, 4])
async def test_suspects_that_hang_leave_the_others_as_much_time(primary: AsyncEngine, slots: int) -> None:
    """Promise 7: two keys that hang whenever they are tried have no more than half of the time."""
    secondary = CheckedSecondary("search", pace=lambda: random.uniform(0.01, 0.03))
    terms: dict[str, Any] = {"batch_size": 10, "attempts_in_flight": slots, "lease": 3, "attempt_deadline": 1.5}
    manager = manager_of(primary, secondary, **terms)
    await manager.register()
    for name in ("one", "two"):
        await _hold(primary, manager, secondary, name)
        secondary.always(name, Hang())
    await execute(primary, "update outbox_hold set alone = true, next_attempt_at = now()")
    await execute(primary, FLOOD, tenant="noisy", many=NOISY)
    already = len(secondary.calls)

    def hung() -> list[Call]:
        return [call for call in secondary.calls[already:] if call.names in (["one"], ["two"])]

    async with running(manager.relay()):
        await eventually(lambda: len(hung()) > 2)
        assert await pending(primary) > NOISY // 4, "the backlog was done, so this shows nothing"
    for before, after in pairwise(hung()):
        assert before.ended is not None
        assert after.began - before.ended >= before.ended - before.began


async def test_draining_leaves_no_suspect_that_is_due(primary: AsyncEngine) -> None:
    """Whose turn it is and who has nothing to send passes it on: nothing due is not what one of two says."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary)
    await manager.register()
    for number in range(3):
        await _hold(primary, manager, secondary, f"suspect-{number}")
    await execute(primary, "update outbox_hold set alone = true, lost = 2, next_attempt_at = now()")
    await write(manager, change("other"))
    assert await manager.relay().drain() == 4
    assert await pending(primary) == 0


def _at_once(one: Call, other: Call) -> bool:
    assert one.finished is not None
    assert other.finished is not None
    return one.started < other.finished and other.started < one.finished


@pytest.mark.parametrize("batch_size", [10, 100])
async def test_a_quiet_tenant_is_served_in_one_of_the_next_claims(primary: AsyncEngine, batch_size: int) -> None:
    """Promise 7: 20,000 deliveries of another tenant stand before each event of eight quiet tenants."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, batch_size=batch_size)
    await manager.register()
    await execute(primary, FLOOD, tenant="noisy", many=NOISY)
    relay = manager.relay()
    for _ in range(5):
        assert await relay.run_once("search") == batch_size
    waited = {}
    for number in range(8):
        await write(manager, change("quiet", tenant=f"quiet-{number}"))
        for claims in range(1, 80):
            await relay.run_once("search")
            if len(secondary.calls_with("quiet")) > number:
                waited[f"quiet-{number}"] = claims
                break
    assert len(waited) == 8
    assert max(waited.values()) <= 3, waited


async def test_at_a_hundred_times_the_load_a_quiet_tenant_waits_for_a_few_batches(primary: AsyncEngine) -> None:
    """F9: counted in batches that began between the quiet commit and its own batch, while the noisy one never ends."""
    slots = 4
    secondary = ScriptedSecondary("search", pace=lambda: 0.002)
    manager = manager_of(primary, secondary, batch_size=20, attempts_in_flight=slots)
    await manager.register()
    lane = "select hashtextextended(:tenant, 0) & 63"
    assert await value(primary, lane, tenant="noisy") != await value(primary, lane, tenant="quiet")
    await execute(primary, FLOOD, tenant="noisy", many=NOISY)
    waited = []
    async with running(manager.relay()):
        await eventually(lambda: len(secondary.calls) > 2 * slots)
        for number in range(25):
            await execute(primary, FLOOD, tenant="noisy", many=100)
            name = f"quiet-{number}"
            await write(manager, change(name, tenant="quiet"))
            already = len(secondary.calls)
            await eventually(lambda name=name: secondary.calls_with(name))
            served = next(at for at, call in enumerate(secondary.calls) if name in call.names)
            waited.append(served - already)
        assert await pending(primary) > NOISY // 4, "the noisy one was done, so this shows nothing"
    # What a claim under way takes, and three claims more, each for all slots.
    assert max(waited) <= 4 * slots, waited


async def test_a_noisy_tenant_is_served_in_full_batches(primary: AsyncEngine) -> None:
    """What is kept free for others costs the noisy one nothing while the others are silent."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, batch_size=50)
    await manager.register()
    await execute(primary, FLOOD, tenant="noisy", many=1_000)
    relay = manager.relay()
    assert [await relay.run_once("search") for _ in range(20)] == [50] * 20


@pytest.mark.parametrize("state", ["retrying", "dead"])
async def test_a_long_tail_behind_a_failing_key_delays_nobody(primary: AsyncEngine, state: str) -> None:
    """Promise 7, log order: three thousand later events of one dead key of the same tenant stand before another key."""
    secondary = ScriptedSecondary("archive")
    manager = manager_of(
        primary, Registration(secondary, ordering="log"), batch_size=50, retry_initial=600, retry_max=600
    )
    await manager.register()
    secondary.always("failing", Rejected("no") if state == "dead" else Retry("no"))
    await write(manager, change("failing"))
    await manager.relay().run_once("archive")
    assert await _is(primary, "failing", state)
    await write(manager, *(change("failing", number) for number in range(3_000)), change("behind"))
    async with running(manager.relay()):
        await eventually(lambda: secondary.sent_to("behind"), timedelta(seconds=5))
    assert len(secondary.sent_to("failing")) == 1


async def test_a_long_tail_is_handed_over_in_batches(primary: AsyncEngine) -> None:
    """L8, F10: many keys with long tails come due at once, and a claim still takes no more than a batch."""
    secondary = ScriptedSecondary("archive")
    terms = Registration(secondary, ordering="log")
    manager = manager_of(primary, terms, batch_size=10, retry_initial=600, retry_max=600)
    await manager.register()
    keys = [f"key-{number}" for number in range(10)]
    for key in keys:
        secondary.always(key, Retry("no"))
    await write(manager, *(change(key) for key in keys))
    await manager.relay().drain()
    await write(manager, *(change(key, number) for number in range(10) for key in keys))
    async with running(manager.relay()):
        await eventually(lambda: _owed_by_holds(primary, 110))
    for key in keys:
        secondary.heal(key)
    await execute(primary, "update outbox_hold set next_attempt_at = now()")
    async with running(manager.relay()):
        await eventually(lambda: len(secondary.history) == 110)
    assert await value(primary, "select max(cardinality(event_ids)) from outbox_attempt") <= 10


async def _owed_by_holds(primary: AsyncEngine, events: int) -> bool:
    return await value(primary, "select sum(cardinality(event_ids)) from outbox_hold") == events
