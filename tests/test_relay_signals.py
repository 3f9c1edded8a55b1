"""Stopping a relay's process: SIGTERM and SIGINT, in good order and at bad moments (S1)."""

from __future__ import annotations

import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import SyncManager
from outbox.testing.process import free_port
from tests.relay_process import Effects, RelayProcess, effects_in, told
from tests.relaying import change, dsn_of, hold_of, manager_of, pending, rows, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually


@asynccontextmanager
async def busy(
    primary: AsyncEngine, database: str, directory: Path, **settings: Any
) -> AsyncIterator[tuple[RelayProcess, SyncManager, Effects]]:
    """A relay process that has one batch out, waiting for a gate."""
    manager = manager_of(primary, ScriptedSecondary("effects"))
    await manager.register()
    await write(manager, told("slow", "wait:gate"))
    async with effects_in(database) as effects:
        with RelayProcess(dsn_of(primary), effects.dsn, directory / "log", **settings) as relay:
            await eventually(lambda: effects.asked("slow"))
            yield relay, manager, effects


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_a_signal_stops_claiming_and_lets_what_is_out_finish(
    primary: AsyncEngine, database: str, tmp_path: Path, number: signal.Signals
) -> None:
    """S1: within the grace the batch is applied and settled, a new event is left for others, the exit code is 0."""
    async with busy(primary, database, tmp_path, shutdown_grace=60) as (relay, manager, effects):
        # Nothing is claimed in vain: it is idle before.
        relay.signal(number)
        await eventually(lambda: _claims_no_more(primary, manager, effects))
        assert relay.code is None, "it has something to finish"
        begun = await value(primary, "select count(*) from outbox_attempt")
        await effects.open_gate("gate")
        assert await eventually(lambda: relay.code is not None)
        assert relay.code == 0
        assert "slow" in await effects.held()
    attempts = await rows(primary, "select * from outbox_attempt")
    # Those that had begun, a new event's among them if it came before the signal was heard, each whole; and no more.
    assert [(row["applied"], row["released"], row["lost"]) for row in attempts] == [(1, 0, 0)] * begun
    assert await value(primary, "select count(*) from outbox_delivery") == 1


async def _claims_no_more(primary: AsyncEngine, manager: SyncManager, effects: Effects) -> bool:
    """Show the relay new events until it has left one alone for many polls."""
    count = len(await effects.asked())
    await write(manager, change("new", count))
    for _ in range(30):
        if await value(primary, "select count(*) from outbox_delivery") == 0:
            return False
    return True


async def test_what_does_not_finish_within_the_grace_is_handed_back(
    primary: AsyncEngine, database: str, tmp_path: Path
) -> None:
    """S1, B3: due again at once, no attempt spent, exit code 0."""
    async with busy(primary, database, tmp_path, shutdown_grace=0.3) as (relay, _, __):
        relay.signal(signal.SIGTERM)
        await eventually(lambda: relay.code is not None)
        assert relay.code == 0
    await _was_handed_back(primary)


async def test_a_second_signal_hurries(primary: AsyncEngine, database: str, tmp_path: Path) -> None:
    """S1: the grace is cut short; the rest is handed back and not lost."""
    async with busy(primary, database, tmp_path, shutdown_grace=600) as (relay, _, __):
        relay.signal(signal.SIGTERM)
        with pytest.raises(AssertionError):
            await eventually(lambda: relay.code is not None, timedelta(seconds=0.5))
        relay.signal(signal.SIGINT)
        await eventually(lambda: relay.code is not None)
        assert relay.code == 0
    await _was_handed_back(primary)


async def _was_handed_back(primary: AsyncEngine) -> None:
    hold = await hold_of(primary, "slow")
    assert hold is not None
    assert (hold["state"], hold["attempts"], hold["lost"]) == ("released", 0, 0)
    assert await value(primary, "select next_attempt_at <= now() from outbox_hold")
    assert await value(primary, "select released from outbox_attempt where finished_at is not null") == 1
    assert await manager_of(primary, ScriptedSecondary("effects")).relay().drain() == 1


async def test_signals_at_moments_of_chance_lose_nothing_and_spend_nothing(
    primary: AsyncEngine, database: str, tmp_path: Path
) -> None:
    """S1: in the midst of claims, dispatches and settles; always exit code 0, never an attempt left open."""
    manager = manager_of(primary, ScriptedSecondary("effects"))
    await manager.register()
    async with effects_in(database) as effects:
        for round_ in range(3):
            await write(manager, *(change(str(number), round_) for number in range(300)))
            already = len(await effects.asked())
            with RelayProcess(dsn_of(primary), effects.dsn, tmp_path / "log", batch_size=7) as relay:
                least = already + random.randint(1, 150)
                await eventually(lambda least=least: _asked(effects, least))
                relay.signal(random.choice([signal.SIGTERM, signal.SIGINT]))
                await eventually(lambda relay=relay: relay.code is not None)
                assert relay.code == 0
            assert await value(primary, "select count(*) from outbox_attempt where finished_at is null") == 0
        with RelayProcess(dsn_of(primary), effects.dsn, tmp_path / "log"):
            await eventually(lambda: _is(primary, 0))
        assert len(await effects.held()) == 300
    assert await value(primary, "select sum(lost + retried) from outbox_attempt") == 0


async def _asked(effects: Effects, least: int) -> bool:
    return len(await effects.asked()) >= least


async def _is(primary: AsyncEngine, owed: int) -> bool:
    return await pending(primary) == owed


async def test_a_signal_ends_a_relay_whose_database_never_answered(database: str, tmp_path: Path) -> None:
    """S1, S2: started before the database, told to stop before it came."""
    nowhere = f"postgresql+asyncpg://postgres@127.0.0.1:{free_port()}/postgres"
    async with effects_in(database) as effects:
        with RelayProcess(nowhere, effects.dsn, tmp_path / "log") as relay:
            await eventually(lambda: "does not answer" in relay.output)
            relay.signal(signal.SIGTERM)
            await eventually(lambda: relay.code is not None, timedelta(seconds=10))
            assert relay.code == 0
