"""Guarantee 11: nothing on its way is reported, whatever commits and is delivered in the middle of a look."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.comparing import NORTH, Interrupted, Note, World, said
from tests.relaying import claim_by_hand


@pytest.fixture
async def world(primary: AsyncEngine) -> World:
    world = await World(primary, Interrupted("mirror")).open()
    await world.write(["1", "2"])
    await world.relay()
    return world


@pytest.mark.parametrize("between", ["away and back", "another and back"])
async def test_two_changes_of_a_key_in_one_commit_are_not_taken_for_drift(world: World, between: str) -> None:
    """R4: both positions are older than the look, both become visible in the middle of it, one is delivered."""
    async with world.manager.session() as session:
        await session.begin()
        note = await session.get_one(Note, ("north", "1"))
        if between == "away and back":
            await session.delete(note)
            await session.flush()
            session.add(Note(tenant_id="north", number="1", content=said("first")))
        else:
            note.content = said("second")
            await session.flush()
            note.content = said("first")
        await session.flush()
        await world.write(["2"], "newer")
        await world.relay()

        async def half_delivered() -> None:
            await session.commit()
            attempt = await claim_by_hand(world.engine, "mirror", batch_size=1, lease=timedelta(minutes=1))
            assert attempt is not None
            assert len(attempt.events) == 1
            await world.secondary.apply(attempt.events)

        world.secondary.before_find = half_delivered
        verdict = await world.judge().judge(*NORTH, ["1"])
    assert world.secondary.content_of("Note", "1", tenant_id="north") != said("first")
    assert (verdict.drifts, verdict.others) == ([], {"moved": 1})
