"""Waiting where positions and servers are odd: cached sequences, a server that is restarted in the midst of it."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from outbox import SyncState, SyncToken, record
from outbox.migrate import migrate
from outbox.secondaries.base import Rejected
from outbox.wait import Found
from outbox.waiters import _Waiter
from tests.relaying import change, execute, manager_of, own_server, running
from tests.scripted import ScriptedSecondary


async def test_a_session_with_lower_positions_in_store_makes_nothing_true_early(primary: AsyncEngine) -> None:
    """W2: with a cached sequence the later commit has the lower position; each token speaks of its own events."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary)
    await manager.register()
    await execute(primary, "alter sequence outbox_event_id_seq cache 50")
    async with primary.connect() as early, primary.connect() as late:
        await record(early, change("first"))
        await early.commit()
        higher = await record(late, change("second"))
        await late.commit()
        async with running(manager.relay()):
            assert await manager.wait_for_sync(higher, timeout=10)
        lower = await record(early, change("third"))
        assert lower.positions < higher.positions
        assert (await manager.wait_for_sync(lower, timeout=0))["search"].state is SyncState.UNCOMMITTED
        await early.commit()
        assert (await manager.wait_for_sync(lower, timeout=0))["search"].state is SyncState.ACCEPTED
        assert secondary.sent_to("third") == []
        async with running(manager.relay()):
            assert await manager.wait_for_sync(lower, timeout=10)
        assert secondary.sent_to("third") == list(lower.positions)


async def test_waiting_survives_a_crash_of_the_server() -> None:
    """W7: while it is away nothing is said; the answer comes from what it knows when it is back."""
    with own_server() as server:
        engine = create_async_engine(server.dsn(), poolclass=NullPool)
        await migrate(engine)
        secondary = ScriptedSecondary("search")
        manager = manager_of(engine, secondary)
        await manager.register()
        async with engine.begin() as connection:
            token = await record(connection, change("1"))
        waiting = asyncio.create_task(manager.wait_for_sync(token, timeout=60))
        await asyncio.to_thread(server.crash)
        while_away = await manager.wait_for_sync(token, timeout=0)
        assert not while_away
        await asyncio.to_thread(server.start)
        assert not waiting.done()
        async with running(manager.relay()):
            assert await waiting
        assert secondary.sent == list(token.positions)
        await manager.aclose()
        await engine.dispose()


async def test_a_look_that_came_too_early_leaves_no_doubt_behind() -> None:
    """W12: an event that a look missed and the next one found is asked about ever more rarely, as any other is."""
    waiter = _Waiter("search", SyncToken.of(7, 1, [(1, ["search"])]), timedelta(0))
    asked = waiter.page[0]
    waiter.learn({asked: Found(SyncState.UNKNOWN)}, {})
    assert waiter.doubtful == {7}
    waiter.learn({asked: Found(SyncState.ACCEPTED)}, {7: SyncState.PRUNED})
    assert not waiter.doubtful
    waiter.since -= 100
    waiter.learn({asked: Found(SyncState.ACCEPTED)}, {})
    assert waiter.next_look - time.monotonic() > 0.1
    assert not waiter.ended.done()


async def test_what_is_gone_is_told_however_many_pages_and_transactions_there_are() -> None:
    """W3: the answer about a transaction is kept until its page is looked at again."""
    owed = [SyncToken.of(transaction, 1, [(transaction, ["search"])]) for transaction in range(1, 1_001)]
    waiter = _Waiter("search", SyncToken.merged(owed), timedelta(0))
    for _ in range(4):
        fates = dict.fromkeys(waiter.doubtful, SyncState.PRUNED)
        waiter.learn({each: Found(SyncState.UNKNOWN) for each in waiter.page}, fates)
    assert waiter.status().state is SyncState.PRUNED


async def test_whoever_does_not_wait_is_answered_when_one_event_is_dead_and_another_is_gone(
    primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the model test: nobody looked again for what was missing, and he was kept as long as a look may take."""
    monkeypatch.setattr("outbox.waiters._FIRST_LOOK", 3600)
    search = ScriptedSecondary("search")
    search.always("bad", Rejected("malformed"))
    manager = manager_of(primary, search)
    await manager.register()
    async with primary.begin() as connection:
        token = await record(connection, [change("bad"), change("gone")])
    await manager.relay().drain()
    await execute(primary, "delete from outbox where resource_id = 'gone'")
    answer = (await manager.wait_for_sync(token, timeout=0))["search"]
    assert (answer.state, answer.synced) == (SyncState.PRUNED, False)
    await manager.aclose()
