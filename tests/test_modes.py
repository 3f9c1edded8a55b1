"""Modes: whether a writer waits, for whom, how long, and that waiting changes nothing about delivery (W8 to W12)."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from outbox import (
    Registration,
    SettingsError,
    SyncConfig,
    SyncEvent,
    SyncManager,
    SyncMode,
    SyncState,
    SyncToken,
    Unavailable,
    UnknownSecondary,
)
from outbox.secondaries.base import Rejected, Retry
from tests.relaying import change, dsn_of, execute, manager_of, pending, raw, rows, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

MODES = list(SyncMode)
RACES = int(os.environ.get("OUTBOX_TEST_RACES", "300"))


@asynccontextmanager
async def managing(engine: AsyncEngine, *secondaries: Any, **settings: Any) -> AsyncIterator[SyncManager]:
    manager = manager_of(engine, *secondaries, **settings)
    await manager.register()
    try:
        yield manager
    finally:
        await manager.aclose()


def states(statuses: Any) -> dict[str, SyncState]:
    return {status.backend_id: status.state for status in statuses}


async def test_asynchronous_is_accepted_at_once_and_carried_by_a_relay(primary: AsyncEngine) -> None:
    """D45: accepted is not applied; the default."""
    secondary = ScriptedSecondary("search")
    async with managing(primary, secondary) as manager:
        assert states(await manager.sync(change("1"))) == {"search": SyncState.ACCEPTED}
        assert secondary.sent == []
        await manager.relay().drain()
        assert len(secondary.history) == 1


async def test_synchronous_waits_for_every_secondary_without_any_relay(primary: AsyncEngine) -> None:
    """D2, D32, D53: the commit stands, then the caller carries its own events by the lease any relay takes."""
    one, two = ScriptedSecondary("one"), ScriptedSecondary("two")
    async with managing(primary, one, two, mode="synchronous") as manager:
        statuses = await manager.sync([change("1"), change("2")])
        assert states(statuses) == {"one": SyncState.APPLIED, "two": SyncState.APPLIED}
        assert [(status.attempts, status.events, status.done) for status in statuses] == [(1, 2, 2)] * 2
        assert all(status.duration.total_seconds() > 0 for status in statuses)
        assert len(one.history) == len(two.history) == 2
        assert await rows(primary, "select count(*) as attempts from outbox_attempt where finished_at is not null") == [
            {"attempts": 2}
        ]


@pytest.mark.parametrize(
    ("sync_for_search", "expected"),
    [
        (True, {"archive": SyncState.ACCEPTED, "search": SyncState.APPLIED}),
        (False, {"archive": SyncState.ACCEPTED, "search": SyncState.ACCEPTED}),
    ],
)
async def test_hybrid_looks_at_the_role_and_not_at_the_kind_of_event(
    primary: AsyncEngine, sync_for_search: bool, expected: dict[str, SyncState]
) -> None:
    """D54: a search secondary is waited for, others are not; for creates, updates and deletes alike."""
    secondaries = [ScriptedSecondary("search"), Registration(ScriptedSecondary("archive"), role="archive")]
    async with managing(primary, *secondaries, mode="hybrid", sync_for_search=sync_for_search) as manager:
        for event in (SyncEvent.create("Thing", "1", {}), change("1"), SyncEvent.delete("Thing", "1")):
            assert states(await manager.sync(event)) == expected


async def test_a_registration_and_a_single_write_may_say_otherwise(primary: AsyncEngine) -> None:
    """D48: a policy per secondary; and what is asked for by name is waited for whatever the mode."""
    must = Registration(ScriptedSecondary("must"), mode=SyncMode.SYNCHRONOUS)
    async with managing(primary, must, ScriptedSecondary("may")) as manager:
        applied, accepted = SyncState.APPLIED, SyncState.ACCEPTED
        assert states(await manager.sync(change("1"))) == {"may": accepted, "must": applied}
        everybody = await manager.sync(change("1"), mode=SyncMode.SYNCHRONOUS)
        assert states(everybody) == {"may": applied, "must": applied}
        nobody = await manager.sync(change("2"), mode=SyncMode.ASYNCHRONOUS)
        assert states(nobody) == {"may": accepted, "must": accepted}
        named = await manager.sync(change("3"), backends=["may"])
        assert states(named) == {"may": applied, "must": accepted}
        assert await rows(primary, "select backend_id, mode from outbox_secondary order by backend_id") == [
            {"backend_id": "may", "mode": "asynchronous"},
            {"backend_id": "must", "mode": "synchronous"},
        ]


async def test_there_is_a_status_for_everybody_who_was_asked_for(primary: AsyncEngine) -> None:
    """D47: also for one that does not want the event; one that nobody knows is refused before anything is written."""
    picky = Registration(ScriptedSecondary("picky"), tenant_ids=["acme"])
    async with managing(primary, picky, ScriptedSecondary("all")) as manager:
        statuses = await manager.sync(change("1"), backends=["picky", "all"])
        assert states(statuses) == {"all": SyncState.APPLIED, "picky": SyncState.NOT_OWED}
        with pytest.raises(UnknownSecondary):
            await manager.sync(change("2"), backends=["nobody"])
        assert await value(primary, "select count(*) from outbox") == 1


@pytest.mark.parametrize(
    ("step", "state", "code"),
    [
        (Rejected("malformed", "no"), SyncState.DEAD, "malformed"),
        (Retry("busy"), SyncState.FAILING, "busy"),
        (RuntimeError("no"), SyncState.FAILING, "adapter_error"),
    ],
)
async def test_what_went_wrong_is_told_and_the_commit_stands(
    primary: AsyncEngine, step: Any, state: SyncState, code: str
) -> None:
    """W9, D46: the caller learns committed and failing or dead, with real attempts; the call never raises for it."""
    secondary = ScriptedSecondary("search")
    secondary.always("1", step)
    async with managing(primary, secondary, mode="synchronous", retry_initial=600, retry_max=600) as manager:
        (status,) = await manager.sync(change("1"), timeout=1.5)
        assert (status.state, status.attempts, status.error_code) == (state, 1, code)
        assert await value(primary, "select count(*) from outbox") == 1


async def test_a_secondary_is_never_touched_before_the_commit(primary: AsyncEngine) -> None:
    """W9: a commit that fails has reached nobody."""
    secondary = ScriptedSecondary("search")
    async with managing(primary, secondary, mode="synchronous") as manager:
        await execute(
            primary,
            "create function refuse() returns trigger language plpgsql as $$ begin raise 'no'; end $$",
        )
        await execute(
            primary,
            "create constraint trigger late after insert on outbox deferrable initially deferred "
            "for each row execute function refuse()",
        )
        with pytest.raises(Exception, match="no"):
            await manager.sync(change("1"))
        assert secondary.calls == []
        assert await pending(primary, "search") == 0


@pytest.mark.parametrize("away", ["hangs", "is down", "is paused"])
async def test_what_is_not_there_in_time_is_on_its_way_and_a_relay_finishes_it(primary: AsyncEngine, away: str) -> None:
    """W11, D53: the deadline is kept whatever the secondary does, others are not delayed, and nothing is lost."""
    slow, well = ScriptedSecondary("slow"), ScriptedSecondary("well")
    async with managing(primary, slow, well, mode="synchronous", lease=5) as manager:
        if away == "hangs":
            slow.hang()
        elif away == "is down":
            slow.down = Unavailable("refused", "down")
        else:
            await execute(primary, "update outbox_secondary set status = 'paused' where backend_id = 'slow'")
        started = asyncio.get_running_loop().time()
        statuses = await manager.sync(change("1"), timeout=0.5)
        took = asyncio.get_running_loop().time() - started
        expected = SyncState.PAUSED if away == "is paused" else SyncState.TIMED_OUT
        assert states(statuses) == {"slow": expected, "well": SyncState.APPLIED}
        assert took < 5, "the deadline was half a second"
        slow.down = None
        slow.release()
        await execute(primary, "update outbox_secondary set status = 'live'")
        async with running(manager.relay()):
            await eventually(lambda: slow.history)
        assert len(slow.history) == 1


async def test_the_deadline_is_kept_when_the_primary_hangs(primary: AsyncEngine) -> None:
    """W11: nobody can say then what became of it; the commit stood before."""
    secondary = ScriptedSecondary("search")
    async with managing(primary, secondary) as manager, raw(primary) as blocking:
        token = await written(manager, change("1"))
        await blocking.execute("begin; lock table outbox_hold, outbox_delivery, outbox_secondary")
        started = asyncio.get_running_loop().time()
        (status,) = await manager.sync(token, mode=SyncMode.SYNCHRONOUS, timeout=0.5)
        assert asyncio.get_running_loop().time() - started < 5
        assert status.state is SyncState.TIMED_OUT
        await blocking.execute("rollback")
        await manager.relay().drain()
        assert await manager.wait_for_sync(token, timeout=5)


async def written(manager: SyncManager, *events: SyncEvent) -> SyncToken:
    async with manager.session() as session:
        session.record(*events)
        await session.commit()
        assert session.token is not None
        return session.token


async def test_a_caller_who_is_cancelled_neither_loses_nor_doubles_anything(primary: AsyncEngine) -> None:
    """W11, D5, SEED check 19: at any await; what was committed is delivered once, what was not is not there."""
    secondary = ScriptedSecondary("search", pace=lambda: 0.002)
    async with managing(primary, secondary, mode="synchronous", lease=5) as manager:
        await manager.sync(change("warm"))
        for number in range(60):
            calling = asyncio.create_task(manager.sync(change(str(number))))
            await asyncio.sleep(random.uniform(0, 0.03))
            calling.cancel()
            with suppress(asyncio.CancelledError):
                await calling
    async with managing(primary, secondary) as manager, running(manager.relay()):
        await eventually(lambda: no_longer_owed(primary))
    committed = {row["event_id"] for row in await rows(primary, "select event_id from outbox")}
    assert committed == {event.position for event in secondary.history}
    assert len(secondary.sent) == len(set(secondary.sent)), "something was sent twice though no lease ran out"
    assert await value(primary, "select coalesce(sum(lost), 0) from outbox_attempt") == 0


async def no_longer_owed(engine: AsyncEngine) -> bool:
    return await pending(engine, "search") == 0


async def test_an_application_on_another_driver_writes_and_waits_too(primary: AsyncEngine) -> None:
    """Relays speak asyncpg; whoever writes on psycopg cannot carry his own events, and waits for them."""
    engine = create_async_engine(dsn_of(primary).replace("+asyncpg", "+psycopg"))
    secondary = ScriptedSecondary("search")
    carrying = manager_of(primary, secondary)
    async with managing(engine, secondary) as manager:
        (status,) = await manager.sync(change("1"), mode=SyncMode.SYNCHRONOUS, timeout=0.2)
        assert status.state is SyncState.TIMED_OUT
        async with running(carrying.relay()):
            assert (await manager.sync(change("2"), mode=SyncMode.SYNCHRONOUS, timeout=10))[0].synced
            bulk_id, token = await manager.sync_bulk([])
            assert (token.positions, await manager.bulk_status(bulk_id)) == ([], [])
            assert await manager.may_read("search")
    await engine.dispose()


async def test_closing_hands_back_what_a_caller_had_in_hand(primary: AsyncEngine) -> None:
    """L6, D3: the manager is closed while a secondary hangs under a caller's write: nothing spent, nothing lost."""
    secondary = ScriptedSecondary("search")
    async with managing(primary, secondary, mode="synchronous", shutdown_grace=0.2, lease=30) as manager:
        await manager.sync(change("warm"))
        secondary.hang()
        calling = asyncio.create_task(manager.sync(change("1"), timeout=20))
        await eventually(lambda: secondary.running)
        await manager.aclose()
        calling.cancel()
    assert await rows(
        primary, "select released, lost, retried from outbox_attempt order by attempt_id desc limit 1"
    ) == [{"released": 1, "lost": 0, "retried": 0}]
    secondary.release()
    async with managing(primary, secondary) as manager:
        await manager.relay().drain()
    assert len(secondary.history) == 2


async def test_closing_lets_a_dispatch_finish_though_another_caller_s_claim_comes_through_late(
    primary: AsyncEngine,
) -> None:
    """L6, W11: only what that claim took is handed back; what was being sent already is not sent twice."""
    secondary = ScriptedSecondary("search")
    async with managing(primary, secondary, mode="synchronous", shutdown_grace=20, lease=30) as manager:
        await manager.sync(change("warm"))
        secondary.hang()
        first = asyncio.create_task(manager.sync(change("1"), timeout=20))
        await eventually(lambda: secondary.running)
        async with raw(primary) as connection, connection.transaction():
            await connection.execute("lock table outbox_attempt in exclusive mode")
            second = asyncio.create_task(manager.sync(change("2"), timeout=20))
            await eventually(lambda: value(primary, "select count(*) from pg_locks where not granted"))
            [carrier] = manager._follower._relay._carriers.values()
            closing = asyncio.create_task(manager.aclose())
            await eventually(lambda: carrier._stopping)
        await eventually(lambda: value(primary, "select sum(released) = 1 from outbox_attempt"))
        assert secondary.running
        secondary.release()
        await closing
        for caller in (first, second):
            caller.cancel()
    assert len(secondary.sent_to("1")) == 1


async def test_callers_and_relays_race_for_the_same_rows_and_never_dispatch_twice(primary: AsyncEngine) -> None:
    """W10, D12, D14: synchronous writes of few keys beside two relays; never two in flight for a key.

    OUTBOX_TEST_RACES says how many; 300.
    """
    secondary = ScriptedSecondary("search", pace=lambda: random.uniform(0, 0.003))
    async with managing(primary, secondary, mode="synchronous", batch_size=5, lease=10) as manager:
        other = manager_of(primary, secondary, batch_size=5, lease=10)

        async def caller(number: int) -> None:
            for step in range(RACES // 10):
                (status,) = await manager.sync(change(str(number % 4), step), timeout=10)
                assert status.synced, status

        async with running(manager.relay(), other.relay()):
            await asyncio.gather(*(caller(number) for number in range(10)))
    assert await value(primary, "select count(*) from outbox") == RACES // 10 * 10
    assert len(secondary.sent) == len(set(secondary.sent))
    for name in "0123":
        # No row lock puts their commits in the order of their positions: what comes late is stale, not applied.
        applied = [event.position for event in secondary.history if event.resource_id == name]
        assert applied == sorted(applied, key=lambda position: position or 0)
        calls = sorted(secondary.calls_with(name), key=lambda call: call.started)
        assert all((before.finished or 0) < after.started for before, after in itertools.pairwise(calls)), (
            "two in flight"
        )


async def test_a_caller_who_carries_its_own_writes_raises_its_floors(primary: AsyncEngine) -> None:
    """Else each would walk, while it has the turn, through all that was deleted since the last vacuum."""
    async with managing(primary, ScriptedSecondary("search"), mode="synchronous") as manager:

        async def raised() -> bool:
            await manager.sync(change("1"), timeout=10)
            relay = manager._follower._relay
            assert relay is not None
            return min(relay._carriers["search"]._floors.lanes.floors) > 0

        await eventually(raised)


async def test_a_reader_asks_less_often_where_asking_costs_more(
    primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts all that is owed: as often as otherwise it would be most of what the primary does."""
    asked, asking = [], SyncManager.backend_status

    async def slowly(manager: SyncManager, backend_id: str) -> Any:
        asked.append(backend_id)
        await asyncio.sleep(0.05)
        return await asking(manager, backend_id)

    async with managing(primary, ScriptedSecondary("search")) as manager:
        await write(manager, change("1"))
        await execute(primary, "update outbox set created_at = now() - interval '1 hour'")
        monkeypatch.setattr(SyncManager, "backend_status", slowly)
        assert not await manager.may_read("search", max_lag=1)
    assert 1 < len(asked) <= 3


async def test_what_waits_before_it_in_its_key_goes_first(primary: AsyncEngine) -> None:
    """D12, D14: mode decides only whether the caller waits; the order is one."""
    secondary = ScriptedSecondary("log")
    async with managing(primary, Registration(secondary, ordering="log")) as manager:
        await write(manager, change("1", 1), change("2", 1), change("1", 2))
        (status,) = await manager.sync(change("1", 3), mode=SyncMode.SYNCHRONOUS)
        assert status.synced
        assert secondary.sent_to("1") == sorted(secondary.sent_to("1"))
        assert len(secondary.sent_to("1")) == 3
        assert secondary.sent_to("2") == [], "the caller carries its own keys and no others"


async def test_behind_a_deep_backlog_a_caller_waits_for_the_relays(primary: AsyncEngine) -> None:
    """F9: one who waits does not pass those who came before in the lane, nor look through all of them."""
    secondary = ScriptedSecondary("search")
    async with managing(primary, secondary, batch_size=10) as manager:
        await write(manager, *(change(f"before-{number}") for number in range(50)))
        (status,) = await manager.sync(change("mine"), mode=SyncMode.SYNCHRONOUS, timeout=0.3)
        assert status.state is SyncState.TIMED_OUT
        assert secondary.calls == []
        waiting = asyncio.create_task(manager.sync(change("other"), mode=SyncMode.SYNCHRONOUS, timeout=20))
        async with running(manager.relay()):
            assert (await waiting)[0].synced


async def test_from_asynchronous_to_synchronous_what_was_left_drains(primary: AsyncEngine) -> None:
    """U12, SEED check 22: a change of mode leaves no rows that nobody carries."""
    secondary = ScriptedSecondary("search")
    async with managing(primary, secondary) as manager:
        await write(manager, *(change(str(number)) for number in range(20)))
    async with managing(primary, secondary, mode="synchronous") as manager, running(manager.relay()):
        assert (await manager.sync(change("new")))[0].synced
        await eventually(lambda: len(secondary.history) == 21)


class Indexed(ScriptedSecondary):
    """One whose searches see what was applied before the last refresh."""

    def __init__(self) -> None:
        super().__init__("index")
        self.seen: set[str] = set()
        self.refreshes = 0

    async def refresh(self) -> None:
        there = {event.resource_id for event in self.history}
        await asyncio.sleep(0.01)
        self.refreshes += 1
        self.seen |= there


async def test_applied_and_visible_are_told_apart(primary: AsyncEngine) -> None:
    """W8, D53: the wait offers both, and many who ask share a refresh that began after they asked."""
    index, plain = Indexed(), ScriptedSecondary("plain")
    async with managing(primary, index, plain) as manager, running(manager.relay()):
        token = await written(manager, change("1"))
        result = await manager.wait_for_sync(token, timeout=10)
        assert (result["index"].visible, index.seen) == (None, set())
        result = await manager.wait_for_sync(token, timeout=10, visible=True)
        assert result
        assert [status.visible for status in result] == [True, True]
        assert index.seen == {"1"}
        tokens = [await written(manager, change(f"many-{number}")) for number in range(40)]
        before = index.refreshes

        async def reader(number: int) -> None:
            assert await manager.wait_for_sync(tokens[number], timeout=10, visible=True)
            assert f"many-{number}" in index.seen

        await asyncio.gather(*(reader(number) for number in range(40)))
        assert index.refreshes - before < 20


@pytest.mark.parametrize("error", [Unavailable("refused", "down"), RuntimeError("no"), asyncio.CancelledError("no")])
async def test_a_refresh_that_does_not_come_is_not_visible(primary: AsyncEngine, error: BaseException) -> None:
    index = Indexed()

    async def refuse() -> None:
        raise error

    index.refresh = refuse  # type: ignore[method-assign]
    async with managing(primary, index) as manager:
        token = await written(manager, change("1"))
        await manager.relay().drain()
        result = await manager.wait_for_sync(token, timeout=2, visible=True)
        assert (result["index"].state, result["index"].visible, bool(result)) == (SyncState.APPLIED, False, False)


async def test_a_manager_goes_on_in_another_loop_once_it_is_closed(primary: AsyncEngine) -> None:
    """As scripts and tests do that call `asyncio.run` more than once; several at once, who share a look and a lock."""
    engine = create_async_engine(dsn_of(primary), poolclass=NullPool)
    manager = manager_of(engine, Indexed(), ScriptedSecondary("plain"))
    await manager.register()

    async def job() -> list[bool]:
        writing = (manager.sync(change(f"{number}"), mode=SyncMode.SYNCHRONOUS, timeout=10) for number in range(5))
        synced = [status.synced for statuses in await asyncio.gather(*writing) for status in statuses]
        token = await written(manager, change("1"))
        await manager.sync(token, mode=SyncMode.SYNCHRONOUS, timeout=10)
        seen = await asyncio.gather(*(manager.wait_for_sync(token, timeout=10, visible=True) for _ in range(5)))
        await manager.aclose()
        return [*synced, *map(bool, seen)]

    for _ in range(2):
        assert all(await asyncio.to_thread(asyncio.run, job()))


async def test_a_reader_waits_up_to_the_greatest_lag_or_goes_to_the_primary(primary: AsyncEngine) -> None:
    """D38: by age for whoever just reads, by token for whoever reads his own write."""
    secondary = ScriptedSecondary("search")
    async with managing(primary, secondary, max_read_lag=0.2) as manager:
        assert await manager.may_read("search")
        token = await written(manager, change("1"))
        assert not await manager.may_read("search", token)
        await execute(primary, "update outbox set created_at = created_at - interval '1 minute'")
        assert not await manager.may_read("search")
        assert not await manager.may_read("search", max_lag=0)
        waiting = asyncio.create_task(manager.may_read("search", max_lag=20))
        async with running(manager.relay()):
            await eventually(lambda: secondary.history)
            assert await waiting
            assert await manager.may_read("search", token)
            assert await manager.may_read("search")
        with pytest.raises(UnknownSecondary):
            await manager.may_read("nobody")


async def test_thousands_wait_on_a_pool_of_five(primary: AsyncEngine) -> None:
    """W12, D42: they share one question at a time, and each is told of its own event."""
    secondary = ScriptedSecondary("search")
    engine = create_async_engine(dsn_of(primary), pool_size=5, max_overflow=0, pool_timeout=5)
    async with managing(engine, secondary, batch_size=100) as manager:
        tokens = []
        for _ in range(20):
            async with manager.session() as session:
                session.record(*(change(f"{len(tokens)}-{number}") for number in range(100)))
                await session.commit()
                assert session.token is not None
                [whole] = session.token.recorded
                transaction = (whole.transaction_id, whole.stamp)
                tokens += [SyncToken.of(*transaction, [(each, ["search"])]) for each in whole.positions]
        waiting = [asyncio.create_task(manager.wait_for_sync(token, timeout=50)) for token in tokens]
        async with running(manager.relay()):
            results = await asyncio.gather(*waiting)
        assert len(results) == 2_000
        assert all(results)
        assert engine.pool.status().count("Connections in pool") == 1
    await engine.dispose()


async def test_waiting_survives_sessions_that_are_cut_off(primary: AsyncEngine) -> None:
    """W7: the primary goes away while somebody waits; the answer comes when it is back."""
    secondary = ScriptedSecondary("search")
    async with managing(primary, secondary) as manager:
        token = await written(manager, change("1"))
        waiting = asyncio.create_task(manager.wait_for_sync(token, timeout=20))
        for _ in range(5):
            async with raw(primary) as connection:
                await connection.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity "
                    "where datname = current_database() and pid <> pg_backend_pid()"
                )
            await asyncio.sleep(0.02)
        async with running(manager.relay()):
            assert await waiting


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), 10**9])
async def test_a_time_that_cannot_be_waited_is_refused(primary: AsyncEngine, timeout: float) -> None:
    async with managing(primary, ScriptedSecondary("search")) as manager:
        with pytest.raises(SettingsError):
            await manager.sync(change("1"), timeout=timeout)
        assert await value(primary, "select count(*) from outbox") == 0


@pytest.mark.parametrize("mode", MODES)
def test_modes_come_from_text_too(mode: SyncMode) -> None:
    assert SyncConfig(mode=mode.value).mode is mode
    with pytest.raises(SettingsError):
        SyncConfig(mode="sometimes")  # type: ignore[arg-type]
