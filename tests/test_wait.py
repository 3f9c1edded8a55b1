"""Waiting where positions and servers are odd: cached sequences, a server that is restarted in the midst of it."""

from __future__ import annotations

import asyncio

from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from outbox import SyncState, record
from outbox.migrate import migrate
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
