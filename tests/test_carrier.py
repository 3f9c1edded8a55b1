"""The carrier's loop: when it looks again, and what it forgets when a look fails."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.carrier import Carrier
from tests.relaying import manager_of, running
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually


async def test_whoever_found_nothing_and_took_long_rests_as_long_whoever_rings(
    primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many keys that are busy are walked past: a bell that rings all the time must not keep that going all the time."""
    looks: list[float] = []

    async def slow(carrier: Carrier, _slots: int) -> list[Any]:
        looks.append(time.monotonic())
        carrier.ring()
        await asyncio.sleep(0.1)
        looks.append(time.monotonic())
        return []

    monkeypatch.setattr(Carrier, "_claim", slow)
    manager = manager_of(primary, ScriptedSecondary("search"))
    async with running(manager.relay()):
        await eventually(lambda: len(looks) >= 7)
    rests = [later - earlier for earlier, later in zip(looks[1::2], looks[2::2], strict=False)]
    assert min(rests) >= 0.1


async def test_a_claim_that_took_too_long_does_not_make_the_next_one_longer(
    primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Floors are forgotten when the primary's history may have gone back, and a time limit says nothing of that."""
    failing, doubts = [asyncpg.QueryCanceledError(), asyncpg.DeadlockDetectedError()], []

    async def fails(_carrier: Carrier, _slots: int) -> list[Any]:
        if failing:
            raise failing.pop()
        return []

    monkeypatch.setattr(Carrier, "_claim", fails)
    monkeypatch.setattr(Carrier, "doubt", lambda carrier: doubts.append(len(failing)))
    manager = manager_of(primary, ScriptedSecondary("search"))
    async with running(manager.relay()):
        await eventually(lambda: not failing)
        await asyncio.sleep(0.1)
    assert doubts == [1]
