"""Promise 5: only the holder of a lease can settle its attempt; a relay that wakes too late changes nothing."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import RetryPolicy, SyncManager
from outbox.attempt import Lost
from outbox.errors import Unavailable
from outbox.lease import expired
from outbox.primary import Primary
from outbox.secondaries.base import Applied, Rejected, Retry
from outbox.settle import settle
from outbox.turn import take_turn
from tests.relay_process import RelayProcess, effects_in, told
from tests.relaying import (
    change,
    claim_by_hand,
    dsn_of,
    everything,
    execute,
    hold_of,
    manager_of,
    pending,
    quick,
    raw,
    rows,
    running,
    value,
    write,
)
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

QUIET = 3600
"""Seconds between housekeeping in tests that compare every row."""


async def nothing_owed(primary: AsyncEngine) -> bool:
    return await pending(primary) == 0


async def test_a_relay_paused_past_its_lease_changes_nothing_when_it_goes_on(
    primary: AsyncEngine, database: str, tmp_path: Path
) -> None:
    """L2, L3: SIGSTOP with a batch in hand, another relay takes over, SIGCONT: every row of every table is the same."""
    other = ScriptedSecondary("effects")
    manager = manager_of(primary, other, prune_interval=QUIET)
    await manager.register()
    await write(manager, told("slow", "wait:gate"), *(change(str(number)) for number in range(5)))
    async with effects_in(database) as effects:
        with RelayProcess(dsn_of(primary), effects.dsn, tmp_path / "log", lease=0.3, prune_interval=QUIET) as relay:
            await eventually(lambda: effects.asked("slow"))
            relay.signal(signal.SIGSTOP)
            async with running(manager.relay()):
                await eventually(lambda: nothing_owed(primary))
            before = await everything(primary)
            await effects.open_gate("gate")
            relay.signal(signal.SIGCONT)
            await eventually(lambda: "no longer ours" in relay.output)
            # It is back at work, and what it does now is its own.
            await write(manager, change("after"))
            await eventually(lambda: effects.asked("after"))
            relay.signal(signal.SIGTERM)
            await eventually(lambda: relay.code == 0)
    after = await everything(primary)
    for table in ("outbox_hold", "outbox_secondary"):
        assert after[table] == before[table]
    assert set(before["outbox_attempt"]) <= set(after["outbox_attempt"])
    assert len(after["outbox_attempt"]) == len(before["outbox_attempt"]) + 1
    assert sum(row["lost"] for row in await rows(primary, "select lost from outbox_attempt")) == 6


def applied(_: ScriptedSecondary) -> None:
    """Nothing to tell: the event is kept."""


def retried(secondary: ScriptedSecondary) -> None:
    secondary.always("1", Retry("late", "too late"))


def rejected(secondary: ScriptedSecondary) -> None:
    secondary.always("1", Rejected("late", "too late"))


def raised(secondary: ScriptedSecondary) -> None:
    secondary.always("1", RuntimeError("too late"))


def refused(secondary: ScriptedSecondary) -> None:
    secondary.down = Unavailable("late", "too late", retry_after=timedelta(seconds=30))


@pytest.mark.parametrize("outcome", [applied, retried, rejected, raised, refused])
@pytest.mark.parametrize("breaker", ["closed", "open"])
async def test_no_late_outcome_changes_anything(
    primary: AsyncEngine,
    outcome: Callable[[ScriptedSecondary], None],
    breaker: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """L3: no attempts, no next time, no error text, no health of the secondary, whatever the late answer is."""
    slow, quick_one = ScriptedSecondary("search"), ScriptedSecondary("search")
    # The next heartbeat is ten seconds away, so it does not learn of its loss before; nor has it room for more.
    settings = {"lease": 30, "attempts_in_flight": 1, "prune_interval": QUIET}
    late, other = (manager_of(primary, each, **settings) for each in (slow, quick_one))
    await late.register()
    await write(late, change("1"))
    # Whoever claims now minds the breaker when it settles.
    await execute(primary, "update outbox_secondary set breaker_failures = 1")
    slow.hang()
    outcome(slow)
    async with running(late.relay()):
        await eventually(lambda: slow.running)
        await execute(primary, "update outbox_attempt set lease_until = now() - interval '1 second'")
        async with running(other.relay()):
            await eventually(lambda: nothing_owed(primary))
        if breaker == "open":
            opened = "breaker = 'open', breaker_opens = 1, breaker_until = now() + interval '1 hour'"
            await execute(primary, f"update outbox_secondary set {opened}")
        before = await everything(primary)
        slow.release()
        await eventually(lambda: "no longer ours" in caplog.text)
    assert await everything(primary) == before
    assert quick_one.history


async def test_only_one_of_two_relays_records_a_loss(primary: AsyncEngine) -> None:
    """L2, B2: both found the same lost attempt; it is settled once and costs its keys one attempt."""
    manager = manager_of(primary, ScriptedSecondary("search"))
    await manager.register()
    await write(manager, *(change(str(number)) for number in range(3)))
    assert await claim_by_hand(primary, "search")
    policy = RetryPolicy.from_config(quick(retry_initial=30, retry_max=30))
    async with raw(primary) as one, raw(primary) as two:
        found = [await expired(each, "public", "search", 0, log_order=False) for each in (one, two)]
        settled = await asyncio.gather(
            *(
                settle(connection, "public", uuid4(), attempts[0], [Lost()] * 3, policy)
                for connection, attempts in zip((one, two), found, strict=True)
            )
        )
    assert [each is None for each in settled].count(True) == 1
    assert [row["attempts"] for row in await rows(primary, "select attempts from outbox_hold")] == [1, 1, 1]
    assert await value(primary, "select sum(lost) from outbox_attempt") == 3


async def test_nobody_else_settles_while_the_lease_lasts(primary: AsyncEngine) -> None:
    """L2: not as applied, not as lost."""
    manager = manager_of(primary, ScriptedSecondary("search"))
    await manager.register()
    await write(manager, change("1"))
    attempt = await claim_by_hand(primary, "search", lease=timedelta(minutes=1))
    assert attempt is not None
    before = await everything(primary)
    async with raw(primary) as connection:
        for result in (Applied(), Retry("no"), Rejected("no"), Lost()):
            policy = RetryPolicy.from_config(quick())
            assert not await settle(connection, "public", uuid4(), attempt, [result], policy)
    assert await everything(primary) == before


async def test_an_attempt_is_settled_once_even_by_its_holder(primary: AsyncEngine) -> None:
    """L2: the answer of the first settle was lost, so the relay settles again; nothing is counted twice."""
    manager = manager_of(primary, ScriptedSecondary("search"))
    await manager.register()
    await write(manager, change("1"))
    relay_id, policy = uuid4(), RetryPolicy.from_config(quick())
    attempt = await claim_by_hand(primary, "search", relay_id=relay_id, lease=timedelta(minutes=1))
    assert attempt is not None
    async with raw(primary) as connection:
        assert await settle(connection, "public", relay_id, attempt, [Retry("once")], policy)
        before = await everything(primary)
        for result in (Retry("twice"), Applied()):
            assert not await settle(connection, "public", relay_id, attempt, [result], policy)
    assert await everything(primary) == before


async def test_heartbeats_keep_a_slow_dispatch_through_many_leases(primary: AsyncEngine) -> None:
    """Design, lease: another relay runs all the time and never takes over; the event is sent once."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, lease=0.6)
    await manager.register()
    await write(manager, change("1"))
    secondary.hang()
    async with running(manager.relay(), manager_of(primary, secondary, lease=0.6).relay()):
        await eventually(lambda: secondary.running)
        first = await value(primary, "select lease_until from outbox_attempt")
        kept = "select lease_until > cast(:first as timestamptz) + interval '1.8 seconds' from outbox_attempt"
        await eventually(lambda: value(primary, kept, first=first))
        secondary.release()
        await eventually(lambda: nothing_owed(primary))
    assert len(secondary.sent) == 1
    (attempt,) = await rows(primary, "select * from outbox_attempt")
    assert (attempt["applied"], attempt["lost"]) == (1, 0)


async def test_a_deadline_bounds_an_attempt_whatever_its_heartbeats_say(primary: AsyncEngine) -> None:
    """L6: the secondary never answers; the attempt ends at its deadline and not before, and costs no attempt."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, lease=0.6, attempt_deadline=0.9, breaker_initial=30, breaker_max=30)
    await manager.register()
    await write(manager, change("1"))
    secondary.hang()
    async with running(manager.relay()):
        attempt = (await eventually(lambda: _closed(primary)))[0]
    assert (attempt["released"], attempt["error_code"], attempt["lost"]) == (1, "timeout", 0)
    lasted = attempt["finished_at"] - attempt["started_at"]
    assert timedelta(seconds=0.85) < lasted < timedelta(seconds=5)
    assert secondary.calls[0].ending == "CancelledError"
    hold = await hold_of(primary, "1")
    assert hold is not None
    assert hold["attempts"] == 0


async def _closed(primary: AsyncEngine) -> list[dict[str, object]]:
    return await rows(primary, "select * from outbox_attempt where finished_at is not null order by attempt_id")


async def test_every_start_of_a_relay_has_a_name_of_its_own(primary: AsyncEngine) -> None:
    """L5: what comes back under the same host name inherits no lease."""
    manager = SyncManager(primary, [ScriptedSecondary("search")])
    assert len({manager.relay().relay_id for _ in range(5)}) == 5


async def test_a_relay_paused_inside_its_claim_keeps_the_others_out_for_a_lease_at_most(primary: AsyncEngine) -> None:
    """L9, T5: what stalls while it holds the registry row is cut off by the server, and its claim undone."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, lease=0.5)
    await manager.register()
    await write(manager, change("1"))
    stalled = await Primary(primary, manager.config).reserved()
    await stalled.execute("begin")
    assert await take_turn(stalled, "public", "search")
    async with running(manager.relay()):
        await eventually(lambda: nothing_owed(primary), timedelta(seconds=5))
    stalled.terminate()
