"""Promise 3, by one statement each: what is held back or in hand keeps its key from everybody who looks for work."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Registration, SyncManager
from outbox.claim import claim, claim_few
from outbox.lanes import Lanes
from outbox.schema import LANES
from outbox.secondaries.base import Retry
from outbox.seize import seize
from outbox.turn import Turn, take_turn
from tests.relaying import (
    change,
    claim_by_hand,
    claim_fresh,
    hold_of,
    manager_of,
    raw,
    rows,
    running,
    value,
    write,
)
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually


@pytest.fixture
def secondary() -> ScriptedSecondary:
    return ScriptedSecondary("search")


@pytest.fixture
async def manager(primary: AsyncEngine, secondary: ScriptedSecondary) -> SyncManager:
    manager = manager_of(primary, Registration(secondary, ordering="log"), retry_initial=600, retry_max=600)
    await manager.register()
    return manager


async def seized(primary: AsyncEngine) -> int | None:
    """Try to take everything that waits, as a caller who waits for it would."""
    positions = [row["event_id"] for row in await rows(primary, "select event_id from outbox_delivery")]
    async with raw(primary) as connection, connection.transaction():
        turn = await take_turn(connection, "public", "search")
        assert turn is not None
        return await seize(
            connection,
            "public",
            backend_id="search",
            relay_id=uuid4(),
            turn=turn,
            event_ids=positions,
            batch_size=100,
            floors=[0] * LANES,
            lease=timedelta(minutes=1),
        )


async def test_a_held_key_is_passed_by(
    primary: AsyncEngine, manager: SyncManager, secondary: ScriptedSecondary
) -> None:
    """O1: its next attempt is minutes away; neither a claim nor a caller who waits takes what came later."""
    secondary.script("1", Retry("busy"))
    await write(manager, change("1", 1))
    await manager.relay().drain()
    assert await hold_of(primary, "1") is not None
    await write(manager, change("1", 2))
    assert await claim_fresh(primary, "search", lanes=Lanes()) == []
    assert await seized(primary) is None
    await write(manager, change("2"))
    (attempt,) = await claim_fresh(primary, "search", lanes=Lanes())
    assert [event.resource_id for event in attempt.events] == ["2"]


async def test_a_key_in_hand_is_passed_by(primary: AsyncEngine, manager: SyncManager) -> None:
    """O1: for as long as its attempt is open, and by a caller who waits, too."""
    await write(manager, change("1", 1))
    assert await claim_by_hand(primary, "search", lease=timedelta(minutes=1))
    await write(manager, change("1", 2))
    assert await claim_fresh(primary, "search", lanes=Lanes()) == []
    assert await seized(primary) is None
    await write(manager, change("2"))
    assert await seized(primary) is not None


@pytest.mark.parametrize("how", [claim, claim_few])
async def test_nobody_else_has_a_turn_while_a_relay_claims(
    primary: AsyncEngine, manager: SyncManager, monkeypatch: pytest.MonkeyPatch, how: Callable[..., Awaitable[Any]]
) -> None:
    """L1, O1: from before it looks at what is in hand until its own attempts are there to be seen."""
    turns: list[Turn | None] = []

    async def looked_at(connection: Any, schema: str, **terms: Any) -> Any:
        opened = await how(connection, schema, **terms)
        async with raw(primary) as other, other.transaction():
            turns.append(await take_turn(other, schema, "search"))
        return opened

    monkeypatch.setattr(f"outbox.taking.{how.__name__}", looked_at)
    await write(manager, change("1"))
    if how is claim:
        assert await manager.relay().drain() == 1
    else:
        async with running(manager.relay()):
            await eventually(lambda: value(primary, "select count(*) = 0 from outbox_delivery"))
    assert turns
    assert not any(turns), "somebody else could claim at the same time"
