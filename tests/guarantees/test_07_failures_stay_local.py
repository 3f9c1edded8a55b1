"""Promise 7: a failing key delays only itself, a failing secondary delays only itself."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Registration, SyncManager
from outbox.errors import Unavailable
from outbox.secondaries.base import Applied, Outcome, Rejected, Retry, Stale
from tests.relaying import change, hold_of, manager_of, pending, running, write
from tests.scripted import CheckedSecondary, ScriptedSecondary
from tests.waiting import eventually

SECRET = "Zebra-4711"


class Mute(Exception):
    """An error that cannot be turned into text."""

    def __str__(self) -> str:
        raise ValueError(SECRET)


async def one(primary: AsyncEngine, **settings: Any) -> tuple[ScriptedSecondary, SyncManager]:
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, **settings)
    await manager.register()
    return secondary, manager


async def owed(primary: AsyncEngine, deliveries: int) -> bool:
    return await pending(primary) == deliveries


async def test_poison_keys_delay_only_themselves(primary: AsyncEngine) -> None:
    """F1: one key in a hundred fails for ever; all others arrive, over and over, and the five wait alone."""
    secondary, manager = await one(primary, max_attempts=1_000_000, batch_size=50)
    for number in range(0, 500, 100):
        secondary.always(str(number), Retry("poison"))
    async with running(manager.relay()):
        for round_ in range(3):
            await write(manager, *(change(str(number), round_) for number in range(500)))
        await eventually(lambda: _all_at(secondary, 495, 2))
        await eventually(lambda: owed(primary, 5))
        # While it runs: what it has in hand when it is stopped is handed back, at no cost.
        await eventually(lambda: _fail(manager, 5))
    assert (await manager.backend_status("search")).dead == 0


async def _fail(manager: SyncManager, keys: int) -> bool:
    return (await manager.backend_status("search")).failing == keys


def _all_at(secondary: ScriptedSecondary, keys: int, value: int) -> bool:
    return len(secondary.held) == keys and all(
        event.content == f'{{"value":{value}}}' for event in secondary.held.values()
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(SECRET),
        ConnectionResetError(SECRET),
        Mute(),
        UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET),
        ExceptionGroup(SECRET, [ValueError(SECRET)]),
        asyncio.CancelledError(SECRET),
        StopAsyncIteration(SECRET),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_one_event_on_which_the_adapter_raises_fails_alone(primary: AsyncEngine, error: BaseException) -> None:
    """F1, F6, promise 14: 99 of 100 are applied in the first attempt; the error's text is stored nowhere."""
    secondary = ScriptedSecondary("search")
    ordering: Any = random.choice(["state", "log"])
    manager = manager_of(primary, Registration(secondary, ordering=ordering), retry_initial=30, retry_max=30)
    await manager.register()
    secondary.always("57", error)
    await write(manager, *(change(str(number)) for number in range(100)))
    async with asyncio.timeout(10):
        assert await manager.relay().run_once("search") == 100

    assert len(secondary.held) == 99
    assert len(secondary.calls) <= 15, "it is found by halving"
    hold = await hold_of(primary, "57")
    assert hold is not None
    assert (hold["state"], hold["attempts"], hold["error_code"]) == ("retrying", 1, "adapter_error")
    assert type(error).__name__ in hold["error"]
    assert SECRET not in hold["error"]


def _wrong_words(outcomes: list[Outcome]) -> list[Any]:
    return ["ok" for _ in outcomes]


@pytest.mark.parametrize(
    "answer",
    [
        lambda outcomes: outcomes[:-1],
        lambda outcomes: [*outcomes, Applied()],
        lambda _: [],
        lambda _: None,
        lambda _: 3,
        lambda _: True,
        _wrong_words,
        lambda outcomes: [None] * len(outcomes),
        lambda outcomes: [Applied] * len(outcomes),
        lambda outcomes: dict(enumerate(outcomes)),
        iter,
    ],
    ids=["short", "long", "empty", "None", "number", "bool", "words", "Nones", "classes", "dict", "iterator"],
)
async def test_an_answer_that_does_not_fit_the_batch_is_believed_of_nobody(primary: AsyncEngine, answer: Any) -> None:
    """F3: all are retried, none is taken for done; the relay and the other secondary go on."""
    secondary, other = ScriptedSecondary("search"), ScriptedSecondary("other")
    manager = manager_of(primary, secondary, other)
    await manager.register()
    secondary.answer = answer
    await write(manager, *(change(str(number)) for number in range(4)))
    async with running(manager.relay()):
        await eventually(lambda: _failing(manager, 4))
        assert {failure.error_code for failure in await manager.failures("search")} == {"unknown_outcome"}
        await write(manager, change("more"))
        await eventually(lambda: len(other.held) == 5)
        secondary.answer = lambda outcomes: outcomes
        await eventually(lambda: owed(primary, 0))
    assert len(secondary.held) == 5


async def _failing(manager: SyncManager, keys: int) -> bool:
    return len(await manager.failures("search")) == keys


async def test_a_partial_answer_settles_each_event_by_its_own_outcome(primary: AsyncEngine) -> None:
    """F3: exactly the failed ones are retried."""
    secondary, manager = await one(primary, retry_initial=30, retry_max=30)
    steps = [Retry("busy"), None, Rejected("bad"), Stale(), None]
    for number, step in enumerate(steps):
        secondary.script(str(number), step)
    await write(manager, *(change(str(number)) for number in range(5)))
    assert await manager.relay().drain() == 5
    status = await manager.backend_status("search")
    assert (status.applied, status.stale, status.retried, status.rejected) == (2, 1, 1, 1)
    assert {failure.resource_id: failure.state for failure in await manager.failures()} == {
        "0": "retrying",
        "2": "dead",
    }


async def test_a_secondary_that_hangs_or_refuses_delays_no_other(primary: AsyncEngine) -> None:
    """F2: one never answers, one is down, one raises on everything; the fourth has each event at once."""
    hanging, down, raising, well = (ScriptedSecondary(name) for name in ("hanging", "down", "raising", "well"))
    manager = manager_of(primary, hanging, down, raising, well, attempts_in_flight=1, relay_connections=2)
    await manager.register()
    hanging.hang()
    down.down = Unavailable("refused", "")
    for number in range(10):
        raising.always(str(number), RuntimeError())
    async with running(manager.relay()):
        for number in range(10):
            await write(manager, change(str(number)))
            await eventually(lambda count=number + 1: len(well.held) == count)
        assert len(hanging.running) == 1
        hanging.release()
    status = await manager.backend_status("well")
    assert (status.applied, status.pending) == (10, 0)


ODD_TEXTS = ["nul \x00 inside", "half \ud83d a pair", "\u202eright to left \x1b[31m red", "long " * 300_000, ""]


@pytest.mark.parametrize("text", ODD_TEXTS, ids=["nul", "surrogate", "controls", "long", "empty"])
@pytest.mark.parametrize("where", ["retry", "rejected", "unavailable"])
async def test_no_text_of_an_adapter_stops_the_relay(primary: AsyncEngine, text: str, where: str) -> None:
    """F6: PostgreSQL would refuse some of these; what is stored is short and printable, and other keys go on."""
    secondary, manager = await one(primary, breaker_threshold=1000)
    steps = {"retry": Retry(text, text), "rejected": Rejected(text, text), "unavailable": Unavailable(text, text)}
    secondary.script("odd", steps[where])
    await write(manager, change("odd"))
    async with running(manager.relay()):
        await eventually(lambda: secondary.calls_with("odd"))
        await write(manager, change("fine"))
        await eventually(lambda: "fine" in {event.resource_id for event in secondary.held.values()})
        await eventually(lambda: owed(primary, 1 if where == "rejected" else 0))
    status = await manager.backend_status("search")
    assert status.lost == 0, "it could not be settled, and was taken over"


@pytest.mark.parametrize("error", [Unavailable("refused", ""), ConnectionResetError(), RuntimeError()], ids=repr)
async def test_a_check_that_fails_in_any_way_means_unavailable(primary: AsyncEngine, error: Exception) -> None:
    """Promises 7 and 8: after a timeout the secondary is asked whether it is there; any error says no."""
    secondary = CheckedSecondary("search")
    manager = manager_of(primary, secondary, lease=1.2, attempt_deadline=0.45, breaker_initial=30, breaker_max=30)
    await manager.register()
    secondary.unreachable = error
    secondary.hang()
    await write(manager, change("1"))
    assert await manager.relay().run_once("search") == 1
    hold = await hold_of(primary, "1")
    assert hold is not None
    assert (hold["state"], hold["attempts"], secondary.checks) == ("released", 0, 1)
