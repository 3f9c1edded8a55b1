"""The doorbell: a hint after each commit, on a connection of its own, and only a hint."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import psycopg
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from outbox import MemorySecondary, SyncConfig, SyncEvent, SyncManager
from outbox.schema import LISTEN_CHANNEL
from outbox.wakeup import Doorbell
from tests.waiting import eventually

both_kinds = pytest.mark.parametrize("kind", ["sync", "async"])
LOOSE = SyncEvent.create("Loose", "1", {})


async def manager_on(primary: AsyncEngine, *, doorbell: bool = False) -> tuple[SyncManager, list[str]]:
    """Return a manager, and a list that grows by one whenever its doorbell rings in this process."""
    manager = SyncManager(primary, [MemorySecondary()], config=SyncConfig(doorbell=doorbell))
    await manager.register()
    rung: list[str] = []
    manager._doorbell.subscribe(lambda: rung.append("ring"))
    return manager, rung


@asynccontextmanager
async def opened(manager: SyncManager, kind: str) -> AsyncIterator[tuple[Any, Callable[..., Any]]]:
    """Yield the synchronous face of a session, and how to call a function that talks to Postgres."""
    if kind == "async":
        async with manager.session() as session:
            yield session.sync_session, lambda call, *args: session.run_sync(lambda _: call(*args))
        return
    engine = create_engine(manager.engine.url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
    with manager.sync_session(engine) as session:

        async def called(call: Callable[..., Any], *args: Any) -> Any:
            return call(*args)

        yield session, called


@both_kinds
async def test_it_rings_once_after_a_commit_and_not_before(primary: AsyncEngine, kind: str) -> None:
    """D6: once, however many events, flushes and savepoints the transaction had."""
    manager, rung = await manager_on(primary)
    async with opened(manager, kind) as (session, call):
        for _ in range(3):
            session.record(LOOSE)
            savepoint = await call(session.begin_nested)
            session.record(LOOSE)
            await call(savepoint.commit)
        assert rung == []
        await call(session.commit)
        assert rung == ["ring"]
        session.record(LOOSE)
        await call(session.commit)
    assert rung == ["ring", "ring"]


@both_kinds
async def test_whoever_hears_it_finds_the_events(primary: AsyncEngine, kind: str) -> None:
    """D6: a bell before the commit would send relays to look too early."""
    manager, _ = await manager_on(primary)
    found: list[int] = []

    def look() -> None:
        with psycopg.connect(plain(primary)) as connection:
            found.extend(row[0] for row in connection.execute("select count(*) from outbox"))

    manager._doorbell.subscribe(look)
    async with opened(manager, kind) as (session, call):
        session.record(LOOSE)
        await call(session.commit)
    assert found == [1]


def plain(primary: AsyncEngine) -> str:
    return primary.url.set(drivername="postgresql").render_as_string(hide_password=False)


@both_kinds
async def test_it_does_not_ring_after_a_rollback_nor_with_the_next_commit(primary: AsyncEngine, kind: str) -> None:
    manager, rung = await manager_on(primary)
    async with opened(manager, kind) as (session, call):
        session.record(LOOSE)
        await call(session.begin_nested)
        await call(session.rollback)
        await call(session.execute, text("select 1"))
        await call(session.commit)
    assert rung == []


@both_kinds
async def test_it_does_not_ring_for_a_transaction_that_records_nothing(primary: AsyncEngine, kind: str) -> None:
    manager, rung = await manager_on(primary)
    async with opened(manager, kind) as (session, call):
        await call(session.execute, text("select 1"))
        await call(session.commit)
    assert rung == []


@both_kinds
async def test_other_processes_hear_it(primary: AsyncEngine, kind: str) -> None:
    manager, _ = await manager_on(primary, doorbell=True)
    heard: list[object] = []
    ear = await asyncpg.connect(plain(primary))
    try:
        await ear.add_listener(LISTEN_CHANNEL, lambda *given: heard.append(given[3]))
        async with opened(manager, kind) as (session, call):
            session.record(LOOSE)
            await call(session.commit)
        await eventually(lambda: heard == ["public"])
    finally:
        await ear.close()
        await eventually(_nobody_rings)


async def test_a_hundred_commits_at_once_are_heard_as_a_few_rings(primary: AsyncEngine) -> None:
    """D6: coalesced, so that writers do not queue for the lock that NOTIFY takes."""
    manager, rung = await manager_on(primary, doorbell=True)
    heard: list[object] = []
    ear = await asyncpg.connect(plain(primary))
    try:
        await ear.add_listener(LISTEN_CHANNEL, lambda *given: heard.append(given[3]))
        for _ in range(100):
            manager.ring()
        await eventually(lambda: heard and _nobody_rings())
        await ear.execute("select 1")
    finally:
        await ear.close()
    assert len(rung) == 100
    assert len(heard) <= 2


async def test_a_bell_that_cannot_be_rung_costs_the_writer_nothing(
    primary: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """D6: the commit stands, and the log has the kind of error without its text."""
    unreachable = create_async_engine(primary.url.set(port=1, password="zebra-7391"), poolclass=NullPool)
    manager, _ = await manager_on(primary, doorbell=True)
    with caplog.at_level(logging.DEBUG, "outbox"):
        manager._doorbell.ring(unreachable)
        await eventually(_nobody_rings)
    (warning,) = [each.getMessage() for each in caplog.records if each.name == "outbox.wakeup"]
    assert "doorbell not rung" in warning
    assert "zebra" not in caplog.text


def _nobody_rings() -> bool:
    return asyncio.all_tasks() == {asyncio.current_task()} and "outbox-doorbell" not in {
        thread.name for thread in threading.enumerate()
    }


def test_whoever_commits_all_the_time_rings_less_often() -> None:
    """More than eight commits in 5 ms, and as many for as long as it goes on."""
    bell = Doorbell("public", across_processes=True)
    bell._earned = 0.0
    pauses = []
    for commits in (1, 8, 9, 33, 32, 9, 0):
        bell._announced = commits
        pauses.append(bell._quiet())
    assert pauses == [0.005, 0.005, 0.02, 0.02, 0.005, 0.02, 0.005]


def test_whoever_commits_now_and_then_is_heard_at_once() -> None:
    """What was idle for a while rings without a pause, for as many times as it earned."""
    bell = Doorbell("public", across_processes=True)
    bell._earned = 0.0
    bell._idle_since -= 0.01
    bell._earn()
    assert [bell._quiet() for _ in range(3)] == [0.0, 0.0, 0.005]
    bell._idle_since -= 3600
    bell._earn()
    assert [bell._quiet() for _ in range(26)] == [0.0] * 25 + [0.005]
