"""What goes wrong, one short function for each. After every step of the history a healthy relay carries on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from datetime import timedelta
from typing import Any

from msgspec.structs import replace

from outbox.attempt import Attempt
from outbox.dispatch import Dispatched
from outbox.event import SyncEvent
from outbox.secondaries.base import Outcome
from outbox.testing.lab_faults import (
    Broken,
    cutting,
    deaf,
    half_answered,
    known_half,
    pausing,
    raising,
    refused,
    telling,
    timing,
    twice,
)
from outbox.testing.lab_ground import STEPS, Apply, Fault, Ground

__all__ = [
    "SCENARIOS",
    "Scenario",
    "answer_lost",
    "applied_twice",
    "crash_before_apply",
    "crash_before_settle",
    "crash_half_way_through",
    "crash_while_claiming",
    "crash_while_settling",
    "cut_off",
    "given_up_on",
    "gone_half_way",
    "half_an_answer",
    "lease_lost_while_applying",
    "newest_first",
    "no_fault",
    "outage",
    "raises",
    "relay_stopped",
    "shuffled",
    "unavailable",
    "woken_too_late",
]

Scenario = Callable[[Ground], Coroutine[Any, Any, None]]

_SHORT = timedelta(milliseconds=50)


class _Crash(Exception):
    """The process is gone: whatever was not committed never happened."""


async def no_fault(ground: Ground) -> None:
    """What differs here differs everywhere."""
    async for _ in ground.steps():
        pass


async def crash_while_claiming(ground: Ground) -> None:
    """The relay dies before its claim is committed."""
    async for _ in ground.steps():
        with suppress(_Crash):
            async with ground.primary.connection() as connection, connection.transaction():
                await ground.claim_on(connection)
                raise _Crash


async def crash_before_apply(ground: Ground) -> None:
    """The relay dies with a batch in hand."""
    async for _ in ground.steps():
        await ground.claim()


async def crash_half_way_through(ground: Ground) -> None:
    """The relay dies when half of its batch has arrived."""
    async for _ in ground.steps():
        attempt = await ground.claim()
        await ground.dispatch(_half_of(attempt))


async def crash_before_settle(ground: Ground) -> None:
    """The relay dies when all of its batch has arrived, and nobody knows."""
    async for _ in ground.steps():
        await ground.dispatch(await ground.claim())


async def crash_while_settling(ground: Ground) -> None:
    """The relay dies before its settle is committed."""
    async for _ in ground.steps():
        attempt = await ground.claim()
        dispatched = await ground.dispatch(attempt)
        with suppress(_Crash):
            async with ground.primary.connection() as connection, connection.transaction():
                await ground.settle_on(connection, attempt, dispatched)
                raise _Crash


async def applied_twice(ground: Ground) -> None:
    """Every batch is handed over twice; the second answer counts."""
    await _break(ground, twice)


async def answer_lost(ground: Ground) -> None:
    """Every batch arrives, and the connection breaks before the answer."""
    await _break(ground, deaf)


async def newest_first(ground: Ground) -> None:
    """Every event arrives after the newest of its key, one at a time, from the newest to the oldest."""
    await _out_of_order(ground, lambda events: events.reverse())


async def shuffled(ground: Ground) -> None:
    """Every event arrives after the newest of its key, one at a time, in an order of chance."""
    await _out_of_order(ground, random.Random(7).shuffle)  # noqa: S311 - an order that can be drawn again


async def lease_lost_while_applying(ground: Ground) -> None:
    """The lease runs out with a batch half applied, and another relay does all of it and something newer meanwhile."""
    for number in range(0, len(STEPS), 2):
        await ground.commit(number)
        slow = await ground.claim()
        if number + 1 < len(STEPS):
            await ground.commit(number + 1)
        half, rest = asyncio.Event(), asyncio.Event()
        ground.faulty.breaks(pausing(half, rest))
        applying = asyncio.create_task(ground.dispatch(slow))
        await half.wait()
        try:
            await ground.carry()
        finally:
            rest.set()
            dispatched = await applying
        await _late_settle(ground, slow, dispatched)


async def woken_too_late(ground: Ground) -> None:
    """Relays were paused with a batch in hand; all is done without them when they wake, apply, and settle."""
    paused = [await ground.claim() async for _ in ground.steps()]
    for attempt in (*paused, *reversed(paused)):
        await _late_settle(ground, attempt, await ground.dispatch(attempt))


async def given_up_on(ground: Ground) -> None:
    """No answer comes within the deadline, and the call takes effect later all the same."""
    late: list[asyncio.Future[Sequence[Outcome]]] = []

    async def fault(apply: Apply, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        late.append(asyncio.ensure_future(apply(batch)))
        return await asyncio.Future()

    async for _ in ground.steps():
        attempt = await ground.claim()
        ground.faulty.breaks(fault)
        await ground.settle(attempt, await ground.dispatch(attempt, _SHORT))
    await asyncio.gather(*late, return_exceptions=True)


async def cut_off(ground: Ground) -> None:
    """A call is cancelled, each time a little later; what it answers nevertheless is believed."""
    took: list[float] = []
    async for _ in ground.steps():
        ground.faulty.breaks(timing(took))
    async for number in ground.steps():
        ground.faulty.breaks(cutting(min(took) * number / len(STEPS)))


async def relay_stopped(ground: Ground) -> None:
    """The relay is cancelled while the secondary works, and hands back what it had."""
    async for _ in ground.steps():
        began = asyncio.Event()
        ground.faulty.breaks(telling(began))
        carrying = asyncio.create_task(ground.manager.relay().run())
        waiting = asyncio.create_task(began.wait())
        await asyncio.wait({carrying, waiting}, return_when=asyncio.FIRST_COMPLETED)
        for task in (carrying, waiting):
            task.cancel()
        await asyncio.gather(carrying, waiting, return_exceptions=True)


async def raises(ground: Ground) -> None:
    """The adapter raises what nobody expects, before anything arrives."""
    await _break(ground, raising(Broken))


async def unavailable(ground: Ground) -> None:
    """The secondary cannot be asked."""
    await _break(ground, raising(refused))


async def gone_half_way(ground: Ground) -> None:
    """Half of the batch arrives, then the secondary is gone, and it is known how far it came."""
    await _break(ground, known_half)


async def half_an_answer(ground: Ground) -> None:
    """All of the batch arrives, and the answer is about half of it."""
    await _break(ground, half_answered)


SCENARIOS: tuple[Scenario, ...] = (
    no_fault,
    crash_while_claiming,
    crash_before_apply,
    crash_half_way_through,
    crash_before_settle,
    crash_while_settling,
    applied_twice,
    answer_lost,
    newest_first,
    shuffled,
    lease_lost_while_applying,
    woken_too_late,
    given_up_on,
    cut_off,
    relay_stopped,
    raises,
    unavailable,
    gone_half_way,
    half_an_answer,
)


def outage(away: Callable[[], AbstractAsyncContextManager[object]]) -> Scenario:
    """Return the scenario in which the secondary's server is really away while a batch is handed over."""

    async def server_away(ground: Ground) -> None:
        for number in range(len(STEPS)):
            await ground.commit(number)
            async with away():
                # One batch only: an adapter that does not say `Unavailable` spends an attempt each time.
                await ground.manager.relay().run_once(ground.faulty.backend_id)
            await ground.carry()

    return server_away


async def _break(ground: Ground, fault: Fault) -> None:
    """Let the first calls after every step fail: those of a whole batch, of its half, of a single event."""
    async for _ in ground.steps():
        ground.faulty.breaks(fault, fault, fault)


async def _out_of_order(ground: Ground, arrange: Callable[[list[SyncEvent]], None]) -> None:
    """Hand over every event when the newest of each key is there already: as relays that come too late would."""
    for number in range(len(STEPS)):
        await ground.commit(number)
    await ground.carry()
    events = await ground.recorded()
    arrange(events)
    for event in events:
        await ground.hand_over([event])


async def _late_settle(ground: Ground, attempt: Attempt, dispatched: Dispatched) -> None:
    """Settle what another relay has taken over."""
    settled = await ground.settle(attempt, dispatched)
    assert settled is None, "a lease that was lost must not settle: a defect of outbox, not of your secondary"


def _half_of(attempt: Attempt) -> Attempt:
    return replace(attempt, events=attempt.events[: (len(attempt.events) + 1) // 2])
