"""Promise 4 for what was forgotten: whatever was on its way when it was erased arrives too late, or without content."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import MemorySecondary, Registration, Secondary, SyncEvent, SyncManager, Unavailable
from outbox.secondaries.base import Closeable, Findable, Refreshable, Rejected, Retry, Stale
from outbox.secondaries.opensearch import OpenSearchSecondary
from outbox.secondaries.sql import SqlSecondary
from outbox.secondaries.valkey import ValkeySecondary
from tests.relaying import claim_by_hand, everything, execute, manager_of, removal, running, write
from tests.scripted import Broken, ScriptedSecondary
from tests.waiting import eventually

CANARY = "canary-c41d"
MADE: list[SyncManager] = []
SECRET = SyncEvent.update("Thing", "1", {"secret": CANARY})


@pytest.fixture(params=["memory", "sql", "valkey", "opensearch"])
async def secondary(request: pytest.FixtureRequest, directory: Path) -> AsyncIterator[Secondary]:
    """A secondary of each kind, empty."""
    made = _made(request, directory)
    yield made
    if isinstance(made, Closeable):
        await made.aclose()


def _made(request: pytest.FixtureRequest, directory: Path) -> Secondary:
    name = uuid4().hex[:12]
    if request.param == "valkey":
        return ValkeySecondary("held", request.getfixturevalue("valkey_url"), name)
    if request.param == "opensearch":
        return OpenSearchSecondary("held", request.getfixturevalue("opensearch_url"), prefix=f"t{name}")
    return (
        MemorySecondary("held")
        if request.param == "memory"
        else SqlSecondary("held", f"sqlite+aiosqlite:///{directory}/held.db")
    )


@pytest.fixture(autouse=True)
async def made(primary: AsyncEngine) -> AsyncIterator[None]:
    """Close every manager that a test made: a caller who waits opens a relay of its own."""
    MADE.clear()
    yield
    for manager in MADE:
        await manager.aclose()


async def started(primary: AsyncEngine, secondary: Secondary | Registration, **settings: Any) -> SyncManager:
    manager = manager_of(primary, secondary, **settings)
    MADE.append(manager)
    await manager.register()
    return manager


async def absent(secondary: Secondary) -> bool:
    assert isinstance(secondary, Findable)
    if isinstance(secondary, Refreshable):
        await secondary.refresh()
    return not await secondary.find("default", "Thing", ["1"])


async def no_trace(primary: AsyncEngine) -> bool:
    return CANARY not in json.dumps(await everything(primary))


async def test_what_a_lost_relay_still_has_in_hand_cannot_bring_it_back(
    primary: AsyncEngine, secondary: Secondary
) -> None:
    """O4, L4, Security 7: a relay sleeps with the content in hand, it is forgotten, and then its request comes."""
    manager = await started(primary, secondary)
    await write(manager, SECRET)
    asleep = await claim_by_hand(primary, "held")
    assert asleep is not None
    assert CANARY in (asleep.events[0].content or "")
    await write(manager, removal("1"))
    async with running(manager.relay()):
        evidence = await manager.forget("Thing", "1")
    assert evidence.secondaries[0].absent is True
    assert evidence.secondaries[0].why is None
    assert await secondary.apply(asleep.events) == [Stale()]
    assert await absent(secondary)
    assert await no_trace(primary)


@pytest.mark.parametrize("ordering", ["state", "log"])
async def test_a_lease_that_runs_out_hands_nothing_but_deletes_to_the_next(primary: AsyncEngine, ordering: Any) -> None:
    """Security 7: what was in hand is redelivered after the scrub, and what is sent then holds nothing."""
    secondary = ScriptedSecondary("held")
    manager = await started(primary, Registration(secondary, ordering=ordering))
    await write(manager, SECRET)
    assert await claim_by_hand(primary, "held") is not None
    await write(manager, removal("1"))
    async with running(manager.relay()):
        evidence = await manager.forget("Thing", "1")
    assert evidence.secondaries[0].why is None
    assert secondary.sent
    assert all(event.content is None for call in secondary.calls for event in call.events)
    assert await no_trace(primary)


@pytest.mark.parametrize("ordering", ["state", "log"])
async def test_what_is_sent_while_it_is_forgotten_is_gone_at_the_end(primary: AsyncEngine, ordering: Any) -> None:
    """Security 7: its answer comes after the scrub, and the delete goes only after that."""
    secondary = ScriptedSecondary("held")
    manager = await started(primary, Registration(secondary, ordering=ordering))
    secondary.hang()
    await write(manager, SECRET)
    async with running(manager.relay()):
        await eventually(lambda: secondary.running)
        await write(manager, removal("1"))
        forgetting = asyncio.create_task(manager.forget("Thing", "1"))
        await eventually(lambda: no_trace(primary))
        assert not forgetting.done()
        secondary.release()
        evidence = await forgetting
    assert evidence.secondaries[0].why is None
    assert secondary.history[0].content is not None
    assert await absent(secondary)


@pytest.mark.parametrize("ordering", ["state", "log"])
@pytest.mark.parametrize("seed", range(5))
async def test_forgetting_under_racing_redelivery_leaves_nothing(
    primary: AsyncEngine, ordering: Any, seed: int
) -> None:
    """Security 7, O4, W1: answers lost, errors that quote content, outages, leases cut short, two relays."""
    draw = random.Random(seed)
    secondary = ScriptedSecondary("held")
    steps: list[Any] = [
        None,
        Broken(ConnectionResetError()),
        Retry("busy", CANARY),
        Rejected("refused", CANARY),
        Unavailable("refused", "on purpose"),
    ]
    secondary.script("1", *(draw.choice(steps) for _ in range(12)))
    manager = await started(primary, Registration(secondary, ordering=ordering), lease=0.3)
    other = manager_of(primary, Registration(secondary, ordering=ordering), lease=0.3)
    async with running(manager.relay(), other.relay()):
        for number in range(draw.randrange(1, 6)):
            await write(manager, SyncEvent.update("Thing", "1", {"secret": CANARY, "number": number}))
            if draw.random() < 0.5:
                await eventually(lambda: secondary.calls)
            if draw.random() < 0.3:
                await execute(primary, "update outbox_attempt set lease_until = now() where finished_at is null")
        await write(manager, removal("1"))
        evidence = await manager.forget("Thing", "1")
        if evidence.secondaries[0].why is not None:
            # Three refusals in a row outlast it; it says so, and a second call does what is left.
            evidence = await manager.forget("Thing", "1")
    assert evidence.secondaries[0].why is None
    assert evidence.secondaries[0].absent is True
    assert await absent(secondary)
    assert await no_trace(primary)
