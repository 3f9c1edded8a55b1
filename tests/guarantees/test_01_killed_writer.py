"""Promise 1: writers in each other's way keep their order, and writers killed while they commit leave no half."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import count
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.synchronize import Event as Flag
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Column, Integer, Text, create_engine, text, update
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import declarative_base
from sqlalchemy.pool import NullPool

from outbox import MemorySecondary, OutboxSession, SyncConfig, SyncEvent, SyncManager
from outbox.migrate import migrate
from outbox.testing.child import ServerMissing
from outbox.testing.postgres import EmbeddedPostgres
from tests.waiting import eventually

_CONFIG = SyncConfig(doorbell=False)
_WRITER = "outbox writer of a test"
# Imported once, before the forks: what this module needs, and the drivers that are only imported when first used.
_PRELOAD = ["outbox.migrate", "outbox.testing.postgres", "tests.waiting", "pytest", "asyncpg", "psycopg"]
_PRELOAD += [f"sqlalchemy.dialects.postgresql.{driver}" for driver in ("asyncpg", "psycopg")]


def entry_class() -> type[Any]:
    class Entry(declarative_base()):
        __tablename__ = "entry"
        id = Column(Text, primary_key=True)
        value = Column(Integer, nullable=False)

    return Entry


async def house(engine: AsyncEngine, entry: type[Any]) -> SyncManager:
    manager = SyncManager(engine, [MemorySecondary("first"), MemorySecondary("second")], config=_CONFIG)
    manager.track(entry)
    await manager.register()
    async with engine.begin() as connection:
        await connection.run_sync(entry.metadata.create_all)
        await connection.execute(text("create table batch (id text primary key)"))
    return manager


async def _changed_then_flushed(session: OutboxSession, entry: type[Any]) -> None:
    (await session.get(entry, "hot")).value = 2
    await session.flush()


async def _recorded_then_changed(session: OutboxSession, entry: type[Any]) -> None:
    session.record(SyncEvent.update("Entry", "hot", {"id": "hot", "value": 2}))
    (await session.get(entry, "hot")).value = 2


async def _recorded_and_changed_before_a_savepoint(session: OutboxSession, entry: type[Any]) -> None:
    row = await session.get(entry, "hot")
    row.value = 2
    session.record(SyncEvent.update("Entry", "hot", {"id": "hot", "value": 2}))
    async with session.begin_nested():
        pass


async def _updated_in_bulk(session: OutboxSession, entry: type[Any]) -> None:
    await session.execute_recorded(update(entry).values(value=2))


WAYS = [_changed_then_flushed, _recorded_then_changed, _recorded_and_changed_before_a_savepoint, _updated_in_bulk]


@pytest.mark.parametrize("write", WAYS)
async def test_positions_follow_the_order_in_which_row_locks_were_had(
    primary: AsyncEngine, write: Callable[[OutboxSession, type[Any]], Awaitable[None]]
) -> None:
    """O2, A10: who waits for a row has drawn no position for it yet. Two sessions, one row."""
    entry = entry_class()
    manager = await house(primary, entry)
    async with manager.session() as session, session.begin():
        session.add(entry(id="hot", value=0))

    async def later() -> None:
        async with manager.session() as session, session.begin():
            await write(session, entry)

    async with manager.session() as session, session.begin(), asyncio.TaskGroup() as group:
        row = await session.get(entry, "hot")
        row.value = 1
        await session.flush()
        waiting = group.create_task(later())
        await eventually(lambda: _someone_waits(primary))
        row.value = 3
        await session.commit()
        await waiting

    values = [value for (value,) in await rows(primary, "select content ->> 'value' from outbox order by event_id")]
    assert list(dict.fromkeys(values)) == ["0", "1", "3", "2"]
    assert await rows(primary, "select value from entry") == [(2,)]


async def _someone_waits(engine: AsyncEngine) -> bool:
    waiting = "select 1 from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    return bool(await rows(engine, waiting))


async def rows(engine: AsyncEngine, query: str) -> list[tuple[Any, ...]]:
    async with engine.connect() as connection:
        return [tuple(row) for row in await connection.execute(text(query))]


def write_for_ever(url: str, seed: int, committed: Flag) -> None:
    """Commit rows and their events as fast as it goes. Runs in a process of its own, to be killed."""
    chance = random.Random(seed)
    engine = create_engine(url, poolclass=NullPool, connect_args={"application_name": _WRITER})
    entry = entry_class()
    manager = SyncManager(create_async_engine(url, poolclass=NullPool), config=_CONFIG)
    manager.track(entry)
    for number in count():
        with manager.sync_session(engine) as session, session.begin():
            batch = uuid4().hex
            session.execute(text("insert into batch values (:id)"), {"id": batch})
            session.record(SyncEvent.create("Batch", batch, {"value": number}))
            for _ in range(chance.randint(1, 5)):
                session.add_all(entry(id=uuid4().hex, value=number) for _ in range(chance.randint(1, 20)))
                session.flush()
        committed.set()


class Writers:
    """Writing processes, one after the other, forked from a process that has everything imported."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)

    async def started(self) -> ForkServerProcess:
        """Return a writer that has committed at least once."""
        committed = self._context.Event()
        seed = random.getrandbits(32)
        process = self._context.Process(target=write_for_ever, args=(self._url, seed, committed), daemon=True)
        process.start()
        await eventually(committed.is_set)
        return process


async def test_a_writer_killed_at_any_moment_leaves_rows_and_events_together(primary: AsyncEngine) -> None:
    """A1: SIGKILL at random until enough of them struck between an event and its commit."""
    await house(primary, entry_class())
    writers = Writers(primary.url.set(drivername="postgresql+psycopg").render_as_string(hide_password=False))
    kills = struck = wasted = 0
    while kills < 12 or struck < 3:
        writer = await writers.started()
        await asyncio.sleep(random.uniform(0, 0.02))
        writer.kill()
        writer.join()
        writer.close()
        await eventually(lambda: _nobody_writes(primary))
        await assert_rows_and_events_agree(primary)
        kills += 1
        before, wasted = wasted, await _positions_nobody_has(primary)
        # Nothing here rolls back, so a position was only lost with a writer that died before its commit.
        struck += wasted > before
        assert kills < 200, f"only {struck} of {kills} kills came between an event and its commit"


async def _nobody_writes(engine: AsyncEngine) -> bool:
    query = text("select 1 from pg_stat_activity where application_name = :name and datname = current_database()")
    async with engine.connect() as connection:
        return (await connection.execute(query, {"name": _WRITER})).first() is None


async def _positions_nobody_has(engine: AsyncEngine) -> int:
    query = "select last_value - (select count(*) from outbox) from outbox_event_id_seq"
    ((wasted,),) = await rows(engine, query)
    return int(wasted)


async def assert_rows_and_events_agree(engine: AsyncEngine) -> None:
    written = await rows(engine, "select 'Entry', id from entry union all select 'Batch', id from batch")
    events = await rows(engine, "select resource_type, resource_id, event_id from outbox")
    assert Counter(written) == Counter((kind, name) for kind, name, _ in events)
    owed = Counter((name, position) for name in ("first", "second") for _, _, position in events)
    assert Counter(await rows(engine, "select backend_id, event_id from outbox_delivery")) == owed


async def test_a_postgres_killed_at_any_moment_leaves_rows_and_events_together() -> None:
    """A1, with a server that keeps what it acknowledged."""
    try:
        server = EmbeddedPostgres().start()
    except ServerMissing as missing:
        pytest.skip(str(missing))
    with server:
        engine = create_async_engine(server.dsn(), poolclass=NullPool)
        await migrate(engine)
        await house(engine, entry_class())
        writers = Writers(server.dsn(driver="postgresql+psycopg"))
        for _ in range(3):
            writer = await writers.started()
            await asyncio.sleep(random.uniform(0, 0.05))
            server.crash()
            writer.join()
            writer.close()
            server.start()
            await assert_rows_and_events_agree(engine)
