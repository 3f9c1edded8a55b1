"""A relay that has ended, and a manager that is closed, take nothing more in hand, and say so."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import SyncManager
from outbox.carrier import Carrier
from tests.relaying import change, manager_of, rows, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually


async def one(primary: AsyncEngine, **settings: Any) -> tuple[ScriptedSecondary, SyncManager]:
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, **settings)
    await manager.register()
    return secondary, manager


async def ended_by_a_cancellation(task: asyncio.Task[None], _: pytest.MonkeyPatch) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def ended_by_an_error(task: asyncio.Task[None], monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise ArithmeticError("on purpose")

    with monkeypatch.context() as patched:
        patched.setattr(Carrier, "_look", fail)
        with pytest.raises(ArithmeticError):
            await task


@pytest.mark.parametrize("end", [ended_by_a_cancellation, ended_by_an_error])
async def test_a_relay_that_has_ended_says_so_when_it_is_run_again(
    primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch, end: Any
) -> None:
    """U8, N3: it would carry nothing, so it must not look well; another one carries what is left."""
    secondary, manager = await one(primary)
    relay = manager.relay()
    await write(manager, change("1"))
    task = asyncio.create_task(relay.run())
    await eventually(lambda: secondary.history)
    await end(task, monkeypatch)
    await write(manager, change("2"))
    with pytest.raises(RuntimeError, match="make another"):
        await relay.run()
    assert not (await manager.health()).process.ok
    async with running(manager.relay()):
        await eventually(lambda: len(secondary.history) == 2)


async def test_one_run_that_is_cut_off_does_not_end_the_other_in_silence(primary: AsyncEngine) -> None:
    """Seed D31: they share what they have in hand, so both end; nobody takes the one that is left for well."""
    secondary, manager = await one(primary)
    relay = manager.relay()
    await write(manager, change("1"))
    first, second = asyncio.create_task(relay.run()), asyncio.create_task(relay.run())
    await eventually(lambda: secondary.history)
    first.cancel()
    with pytest.raises(RuntimeError, match="make another"):
        await second
    assert not (await manager.health()).process.ok


async def test_a_relay_that_was_stopped_ends_at_once_when_it_is_run_again(primary: AsyncEngine) -> None:
    _, manager = await one(primary)
    relay = manager.relay()
    async with running(relay):
        pass
    await asyncio.wait_for(relay.run(), timeout=30)


async def test_no_page_of_a_long_write_is_begun_once_the_manager_is_closing(primary: AsyncEngine) -> None:
    """L6: what was claimed then would be left in hand, and wait for its lease to run out."""
    secondary, manager = await one(primary, mode="synchronous", batch_size=1, shutdown_grace=20, lease=30)
    secondary.hang()
    calling = asyncio.create_task(manager.sync([change(f"{number}") for number in range(40)], timeout=20))
    await eventually(lambda: secondary.running)
    relay = manager._follower._relay
    assert relay is not None
    closing = asyncio.create_task(manager.aclose())
    await eventually(lambda: relay._carriers["search"]._stopping)
    secondary.release()
    await closing
    calling.cancel()
    assert await rows(primary, "select finished_at is null as in_hand, released from outbox_attempt") == [
        {"in_hand": False, "released": 0}
    ]
    assert await value(primary, "select count(*) from outbox_delivery") == 39
