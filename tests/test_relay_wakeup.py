"""Waking up: polling alone bounds the delay, the doorbell shortens it, and losing it costs at most a poll (D6)."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import record
from tests.relay_process import RelayProcess, effects_in
from tests.relaying import change, dsn_of, execute, manager_of, pending, raw, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

LISTENING = """
select pid from pg_stat_activity
where datname = current_database() and application_name = 'outbox relay' and query ilike 'listen%'
"""
LONG = 60.0
"""A poll interval beyond every deadline here: what arrives was rung for, once the first sleeps are over."""


def clock() -> float:
    return asyncio.get_running_loop().time()


async def long_asleep() -> None:
    """Return when a relay that has been idle since has doubled its sleep beyond two seconds."""
    since = clock()
    await eventually(lambda: clock() - since > 4.3)


async def test_polling_alone_finds_what_nobody_rang_for(primary: AsyncEngine) -> None:
    """D6: an idle relay without any doorbell is at most one poll interval late."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, poll_interval=0.5)
    await manager.register()
    async with running(manager.relay()), raw(primary) as connection:
        delays = []
        for number in range(4):
            async with connection.transaction():
                await record(connection, change(str(number)))
            committed = clock()
            await eventually(lambda count=number + 1: len(secondary.held) == count)
            delays.append(clock() - committed)
    # And two seconds for shared cores.
    assert max(delays) < 0.5 + 2.0


async def test_the_doorbell_wakes_a_relay_of_another_process_at_once(
    primary: AsyncEngine, database: str, tmp_path: Path
) -> None:
    """Its next poll is seconds away; the commit rings through PostgreSQL, outside the transaction."""
    manager = manager_of(primary, ScriptedSecondary("effects"), doorbell=True)
    await manager.register()
    async with effects_in(database) as effects:
        with RelayProcess(dsn_of(primary), effects.dsn, tmp_path / "log", poll_interval=LONG):
            await eventually(lambda: _somebody_listens(primary))
            await long_asleep()
            committed = clock()
            await write(manager, change("1"))
            await eventually(lambda: effects.asked("1"))
            assert clock() - committed < 1.5


async def _somebody_listens(primary: AsyncEngine) -> bool:
    return await value(primary, f"select count(*) from ({LISTENING}) as listening") > 0


async def test_a_doorbell_whose_connection_was_cut_rings_again(primary: AsyncEngine) -> None:
    """D6, L11: the relay listens anew by itself, and looks once for what was rung meanwhile."""
    secondary = ScriptedSecondary("search")
    reader = manager_of(primary, secondary, poll_interval=LONG, lease=1)
    writer = manager_of(primary, secondary, doorbell=True)
    await reader.register()
    async with running(reader.relay()):
        before = await eventually(lambda: _listener(primary))
        await execute(primary, "select pg_terminate_backend(:pid)", pid=before)
        await eventually(lambda: _other_listener(primary, before))
        await long_asleep()
        committed = clock()
        await write(writer, change("1"))
        await eventually(lambda: secondary.held, timedelta(seconds=30))
        assert clock() - committed < 1.5


async def _listener(primary: AsyncEngine) -> int | None:
    return await value(primary, f"select coalesce(max(pid), 0) from ({LISTENING}) as listening")


async def _other_listener(primary: AsyncEngine, before: int) -> bool:
    return await _listener(primary) not in (0, before)


async def test_relays_of_the_same_process_are_rung_without_the_database(primary: AsyncEngine) -> None:
    """With the doorbell off, a commit in the relay's own process wakes it all the same; from a thread too."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, poll_interval=LONG, doorbell=False)
    await manager.register()
    engine = create_engine(primary.url.set(drivername="postgresql+psycopg"))

    def write_from_a_thread() -> None:
        with manager.sync_session(engine) as session, session.begin():
            session.record(change("2"))

    async with running(manager.relay()):
        await long_asleep()
        committed = clock()
        await write(manager, change("1"))
        await eventually(lambda: len(secondary.held) == 1)
        await asyncio.to_thread(write_from_a_thread)
        await eventually(lambda: len(secondary.held) == 2)
        assert clock() - committed < 1.5
    engine.dispose()


async def test_a_full_backlog_needs_no_bell_between_batches(primary: AsyncEngine) -> None:
    """After a batch the relay looks again at once: a hundred batches in far less than a hundred polls."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, poll_interval=LONG, batch_size=3, attempts_in_flight=1)
    await manager.register()
    await write(manager, *(change(str(number)) for number in range(300)))
    async with running(manager.relay()):
        await eventually(lambda: _is(primary, 0))
    assert len(secondary.calls) == 100


async def _is(primary: AsyncEngine, owed: int) -> bool:
    return await pending(primary) == owed
