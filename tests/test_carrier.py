"""The carrier's loop: when it looks again, and what it forgets when a look fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Rejected, Retry, SyncEvent
from outbox.carrier import Carrier
from outbox.claim import claim, claim_few
from outbox.resume import Resumed, resume
from tests.relaying import change, execute, manager_of, running, value, write
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


async def test_a_look_at_holds_that_takes_long_is_rare_while_there_is_other_work(
    primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held in a long line must not slow the others down; when there are no others, nothing waits for it."""
    looks: list[str] = []

    async def looks_at_holds(*given: Any, **more: Any) -> Resumed:
        looks.append("holds")
        await asyncio.sleep(0.05)
        return await resume(*given, **more)

    def takes_the_others(how: Callable[..., Awaitable[list[Any]]]) -> Callable[..., Awaitable[list[Any]]]:
        async def taking(*given: Any, **more: Any) -> list[Any]:
            taken = await how(*given, **more)
            looks.append("others" if taken else "nobody")
            return taken

        return taking

    monkeypatch.setattr("outbox.suspects.resume", looks_at_holds)
    monkeypatch.setattr("outbox.taking.claim", takes_the_others(claim))
    monkeypatch.setattr("outbox.taking.claim_few", takes_the_others(claim_few))
    secondary = ScriptedSecondary("search")
    secondary.always("poisoned", Retry("poisoned"))
    manager = manager_of(primary, secondary, batch_size=1, max_attempts=1_000)
    await manager.register()
    await write(manager, change("poisoned"))
    async with running(manager.relay()):
        await eventually(lambda: "holds" in looks)
        looks.clear()
        await write(manager, *[change(f"other-{number}") for number in range(1_500)])
        await eventually(lambda: len(secondary.calls) > 1_500)
    between: list[list[str]] = [[]]
    for what in looks:
        between += [[]] if what == "holds" else []
        between[-1] += [what] if what != "holds" else []
    full = [each for each in between[1:-1] if "nobody" not in each]
    assert max(map(len, between)) >= 10
    assert all(len(each) >= 3 for each in full), between


async def test_a_probe_that_a_hold_absorbed_is_announced(primary: AsyncEngine) -> None:
    """A newer event revives its dead key: taken up and taken out at once, it is the one probe there may be."""
    seen: list[str] = []

    class Probed(ScriptedSecondary):
        async def apply(self, batch: Sequence[SyncEvent]) -> Any:
            seen.append(await value(primary, "select breaker from outbox_secondary"))
            return await super().apply(batch)

    secondary = Probed("search")
    secondary.script("dead", Rejected("malformed"))
    manager = manager_of(primary, secondary)
    await manager.register()
    await write(manager, change("dead"))
    assert await manager.relay().run_once("search") == 1
    await write(manager, change("dead", 1))
    await execute(primary, "update outbox_secondary set breaker = 'open', breaker_until = now() - interval '1 s'")
    assert await manager.relay().run_once("search") == 1
    assert seen == ["closed", "half_open"]
