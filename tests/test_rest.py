"""Rest: where nothing is owed, held or in hand, a relay asks for the highest position, and takes no turn for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Retry, SyncManager
from outbox.carrier import Carrier
from outbox.floors import Floors
from outbox.hands import Opened
from outbox.lanes import Lanes
from tests.relaying import change, claim_fresh, execute, manager_of, rows, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

# Far away: what is seen here is seen by resting relays, and not by the look that they take now and then anyway.
NEVER = 3_600.0


class Looks(NamedTuple):
    """How often anything was asked: whether there can be something, and what there is."""

    rests: list[bool]
    claims: list[int]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    looks, at_rest, claims = Looks([], []), Floors.at_rest, Carrier._claim

    async def asked(floors: Floors) -> bool:
        looks.rests.append(await at_rest(floors))
        return looks.rests[-1]

    async def claimed(carrier: Carrier, slots: int) -> list[Opened] | None:
        opened = await claims(carrier, slots)
        looks.claims.append(len(opened or ()))
        return opened

    monkeypatch.setattr(Floors, "at_rest", asked)
    monkeypatch.setattr(Carrier, "_claim", claimed)
    return looks


@pytest.fixture
def secondary() -> ScriptedSecondary:
    return ScriptedSecondary("search")


@pytest.fixture
async def manager(primary: AsyncEngine, secondary: ScriptedSecondary) -> SyncManager:
    manager = manager_of(
        primary, secondary, doorbell=False, prune_interval=NEVER, unhealthy_after_silence=None, poll_interval=0.01
    )
    await manager.register()
    return manager


@pytest.fixture
async def carrier(manager: SyncManager) -> AsyncIterator[Carrier]:
    """Of a relay that is open, and that does nothing but what it is told."""
    relay = manager.relay()
    async with relay._opened():
        yield relay._carriers["search"]


async def come_to_rest(carrier: Carrier) -> None:
    """Raise the floors as a relay does between its looks, then look."""
    for _ in range(2):
        carrier._floors._raised_at = 0.0
        await carrier._floors.mind(busy=True)
    assert await carrier._look(rung=True) == []


async def test_an_idle_relay_writes_nothing_and_finds_what_comes(
    primary: AsyncEngine, manager: SyncManager, secondary: ScriptedSecondary, looks: Looks
) -> None:
    """A lock and a commit for every look would be written to disk, shipped to standbys and archived, day and night."""
    ids = "select cast(cast(pg_snapshot_xmax(pg_current_snapshot()) as text) as bigint)"
    # Another process: nothing tells the relay that it writes.
    others = manager_of(primary, ScriptedSecondary("search"), doorbell=False)
    async with running(manager.relay()):
        for number in range(3):
            await write(others, change(f"number {number}"))
            await eventually(lambda expected=number + 1: len(secondary.held) == expected)
            await eventually(lambda: looks.rests[-5:] == [True] * 5)
            claims, rests, before = len(looks.claims), len(looks.rests), await value(primary, ids)
            await eventually(lambda least=rests + 20: len(looks.rests) > least)
            assert (len(looks.claims), await value(primary, ids)) == (claims, before)


async def test_a_position_that_was_drawn_ends_the_rest(primary: AsyncEngine, carrier: Carrier) -> None:
    """Whoever drew it may commit it at any time."""
    await come_to_rest(carrier)
    assert await carrier._floors.at_rest()
    await execute(primary, "select nextval('outbox_event_id_seq')")
    assert not await carrier._floors.at_rest()


async def test_what_another_relay_has_in_hand_lets_nobody_rest(
    primary: AsyncEngine, manager: SyncManager, carrier: Carrier
) -> None:
    """It may hand it back, or never come to its end."""
    await write(manager, change("in hand"))
    assert await claim_fresh(primary, "search", lanes=Lanes())
    await come_to_rest(carrier)
    assert not await carrier._floors.at_rest()


async def test_what_is_held_lets_nobody_rest(
    primary: AsyncEngine, manager: SyncManager, secondary: ScriptedSecondary, carrier: Carrier
) -> None:
    secondary.always("fails", Retry("no"))
    await write(manager, change("fails"))
    assert await carrier.run_once() == 1
    assert await rows(primary, "select state from outbox_hold")
    await execute(primary, "update outbox_hold set next_attempt_at = next_attempt_at + interval '1 hour'")
    await come_to_rest(carrier)
    assert not await carrier._floors.at_rest()


async def test_a_new_connection_ends_the_rest(carrier: Carrier) -> None:
    """A primary that crashed gives positions again: the same highest one may be another's."""
    await come_to_rest(carrier)
    assert await carrier._floors.at_rest()
    carrier._primary.connected += 1
    assert not await carrier._floors.at_rest()
