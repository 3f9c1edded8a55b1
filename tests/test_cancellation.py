"""Cancellation: whatever is awaited of a secondary or a primary that hangs ends soon and is not tried again (B8)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest
from sqlalchemy.event import listen
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox import SyncManager, SyncMode, SyncToken, record
from outbox.carrier import Carrier
from outbox.floors import Floors
from outbox.hands import Opened
from tests.relaying import change, manager_of, pending, raw, rows, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

A_SECOND = 1.0


class Base(DeclarativeBase): ...


class Thing(Base):
    __tablename__ = "thing"
    number: Mapped[str] = mapped_column(primary_key=True)


Call = Callable[[SyncManager, SyncToken], Awaitable[object]]


async def _record(manager: SyncManager, _: SyncToken) -> None:
    async with manager.engine.begin() as connection:
        await record(connection, change("recorded"))


async def _session(manager: SyncManager, _: SyncToken) -> None:
    await write(manager, change("recorded"))


# What waits for the secondary, and what for the primary.
AT_THE_SECONDARY: dict[str, Call] = {
    "run": lambda manager, _: manager.relay().run(),
    "run_once": lambda manager, _: manager.relay().run_once("search"),
    "drain": lambda manager, _: manager.relay().drain(),
    "sync": lambda manager, token: manager.sync(token, mode=SyncMode.SYNCHRONOUS, timeout=60),
    "wait_for_sync": lambda manager, token: manager.wait_for_sync(token, timeout=60),
    "reconcile": lambda manager, _: manager.reconcile("search", patience=timedelta(seconds=60)),
}
AT_THE_PRIMARY: dict[str, Call] = AT_THE_SECONDARY | {
    "record": _record,
    "session": _session,
    "sync of an event": lambda manager, _: manager.sync(change("synced"), timeout=60),
    "register": lambda manager, _: manager.register(),
    "backend_status": lambda manager, _: manager.backend_status("search"),
    "health": lambda manager, _: manager.health(),
    "failures": lambda manager, _: manager.failures(),
}


async def house(primary: AsyncEngine) -> tuple[ScriptedSecondary, SyncManager, SyncToken]:
    """A hanging secondary that is owed one event and knows of a thing that is not there."""
    async with primary.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, lease=30, shutdown_grace=60, health_timeout=60, statement_timeout=60)
    manager.track(Thing, resource_id=Thing.number, content=lambda thing: {"number": thing.number})
    await manager.register()
    async with manager.session() as session:
        session.add(Thing(number="1"))
        await session.commit()
        assert session.token is not None
        token = session.token
    secondary.hang()
    return secondary, manager, token


async def cancelled_within(calling: asyncio.Task[object]) -> float:
    """Cancel a task and return how many seconds it took to end; it must not end in any other way."""
    began = time.monotonic()
    calling.cancel()
    done, _ = await asyncio.wait({calling}, timeout=30)
    assert done, "it never ended"
    assert calling.cancelled(), calling.exception()
    return time.monotonic() - began


async def _call(call: Call, manager: SyncManager, token: SyncToken) -> object:
    return await call(manager, token)


@pytest.mark.parametrize("name", AT_THE_SECONDARY)
async def test_whoever_waits_for_a_secondary_that_hangs_can_be_cancelled(primary: AsyncEngine, name: str) -> None:
    """B8: within a second; what was in hand is handed back with no attempt spent, or goes on without the caller."""
    secondary, manager, token = await house(primary)
    asked: list[str] = []
    listen(primary.sync_engine, "before_cursor_execute", lambda *args: asked.append(args[2]))
    calling = asyncio.create_task(_call(AT_THE_SECONDARY[name], manager, token))
    if name in ("run", "run_once", "drain", "sync"):
        await eventually(lambda: secondary.running)
    else:
        await eventually(lambda: any("outbox_delivery" in statement for statement in asked))
    assert await cancelled_within(calling) < A_SECOND
    secondary.release()
    await manager.aclose()
    async with running(manager.relay()):
        await eventually(lambda: _nothing_owed(primary))
    assert secondary.content_of("Thing", "1") is not None
    assert await value(primary, "select sum(retried + lost) from outbox_attempt") == 0


@pytest.mark.parametrize("name", ["run_once", "drain"])
async def test_whoever_is_cancelled_right_after_a_claim_leaves_nothing_out(
    primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """B8: nor when what was claimed goes out already, and he is at something else."""
    secondary, manager, token = await house(primary)
    minding = asyncio.Event()

    async def mind(*_: object, **__: object) -> None:
        minding.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Floors, "mind", mind)
    calling = asyncio.create_task(_call(AT_THE_SECONDARY[name], manager, token))
    await minding.wait()
    await eventually(lambda: secondary.running)
    assert await cancelled_within(calling) < A_SECOND
    assert await value(primary, "select count(*) from outbox_attempt where finished_at is null") == 0
    assert await value(primary, "select sum(retried + lost) from outbox_attempt") == 0


@pytest.mark.parametrize("name", ["run_once", "drain"])
async def test_whoever_is_cancelled_in_a_claim_leaves_nothing_out(
    primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """B8: it may have committed already, and its answer be on the way."""
    _, manager, token = await house(primary)
    claim, claimed = Carrier._claim, asyncio.Event()

    async def answered_late(carrier: Carrier, slots: int) -> list[Opened] | None:
        opened = await claim(carrier, slots)
        claimed.set()
        await asyncio.sleep(0.1)
        return opened

    monkeypatch.setattr(Carrier, "_claim", answered_late)
    calling = asyncio.create_task(_call(AT_THE_SECONDARY[name], manager, token))
    await claimed.wait()
    assert await cancelled_within(calling) < A_SECOND
    assert await value(primary, "select count(*) from outbox_attempt where finished_at is null") == 0
    assert await value(primary, "select released from outbox_attempt") == 1


async def _nothing_owed(primary: AsyncEngine) -> bool:
    return await pending(primary) == 0


@pytest.mark.parametrize("name", AT_THE_PRIMARY)
async def test_whoever_waits_for_a_primary_that_hangs_can_be_cancelled(primary: AsyncEngine, name: str) -> None:
    """B8: within a second of the cancellation, wherever the statement waits; no session is left behind."""
    secondary, manager, token = await house(primary)
    tables = "outbox, outbox_delivery, outbox_attempt, outbox_hold, outbox_secondary, thing"
    async with raw(primary) as blocking:
        async with blocking.transaction():
            await blocking.execute(f"lock table {tables} in access exclusive mode")
            calling = asyncio.create_task(_call(AT_THE_PRIMARY[name], manager, token))
            await eventually(lambda: _waits(primary))
            took = await cancelled_within(calling)
        secondary.release()
        await manager.aclose()
        await eventually(lambda: _is_quiet(primary))
    assert took < A_SECOND
    assert await value(primary, "select count(*) from outbox") == 1


async def test_a_relay_whose_primary_hangs_in_the_midst_of_work_ends_in_bounded_time(primary: AsyncEngine) -> None:
    """B8, though not within a second: claim, hand-back, its second try and the pool have five seconds each to end in
    order."""
    secondary, manager, _ = await house(primary)
    running_relay = asyncio.create_task(manager.relay().run())
    await eventually(lambda: secondary.running)
    async with raw(primary) as blocking, blocking.transaction():
        await blocking.execute("lock table outbox_attempt in access exclusive mode")
        secondary.release()
        await eventually(lambda: _waits(primary))
        took = await cancelled_within(running_relay)
    assert took < 4 * 5 + 5
    # Nobody has it in hand any more; it is there for whoever comes when its lease is over.
    assert await value(primary, "select count(*) from outbox_attempt where finished_at is null") == 1


async def _waits(primary: AsyncEngine) -> bool:
    waiting = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    return await value(primary, waiting) > 0


async def _is_quiet(primary: AsyncEngine) -> bool:
    busy = "select pid from pg_stat_activity where datname = current_database() and state <> 'idle'"
    return await rows(primary, f"{busy} and pid <> pg_backend_pid()") == []
