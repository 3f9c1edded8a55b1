"""Dispatch believes of an adapter's answer only what can be used, and asks it nothing more once its time is over."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Operation, SyncEvent
from outbox.attempt import Attempt, Released, Result
from outbox.dispatch import Dispatched, dispatch, highest_of
from outbox.errors import Unavailable
from outbox.secondaries.base import Applied, Retry
from tests.relaying import change, manager_of, rows, running, value, write
from tests.scripted import CheckedSecondary, Hang, ScriptedSecondary
from tests.waiting import eventually

Cancelled = Callable[[], Awaitable[Any]]


def in_hand(names: str, *, log_order: bool = False) -> Attempt:
    """An attempt with one event for each letter."""
    events = [
        SyncEvent("default", "Thing", name, Operation.UPDATE, "{}", position=position)
        for position, name in enumerate(names, 1)
    ]
    return Attempt(1, "scripted", log_order, events)


async def ended(secondary: ScriptedSecondary, attempt: Attempt) -> Dispatched:
    """Dispatch with a short deadline, which must be kept."""
    dispatching = asyncio.create_task(dispatch(secondary, attempt, timedelta(seconds=0.1)))
    await asyncio.wait({dispatching}, timeout=3)
    in_time = dispatching.done()
    secondary.release()
    assert in_time, "it goes on without a deadline"
    return await dispatching


# What is no wait is none


WAITS: list[tuple[Any, timedelta | None]] = [
    (timedelta(seconds=7), timedelta(seconds=7)),
    (5, timedelta(seconds=5)),
    (2.5, timedelta(seconds=2.5)),
    (0, timedelta(0)),
    (10**400, timedelta(seconds=86_399_999_999_999)),
    (-1, None),
    (math.nan, None),
    (math.inf, None),
    ("5", None),
    (None, None),
]


@pytest.mark.parametrize(("asked", "believed"), WAITS, ids=lambda value: str(value)[:10])
async def test_a_wait_may_be_told_in_seconds_and_anything_else_is_none(asked: Any, believed: timedelta | None) -> None:
    """Promise 7: of an outcome, of a secondary that is away, of what was known by then, and of one that is asked."""
    secondary = ScriptedSecondary()
    secondary.always("a", Retry("busy", after=asked))
    assert (await ended(secondary, in_hand("ab"))).results == [Retry("busy", after=believed), Applied()]
    secondary.down = Unavailable("throttled", "", retry_after=asked, known=[Retry("busy", after=asked), None])
    away = await ended(secondary, in_hand("ab"))
    assert away.results == [Retry("busy", after=believed), Released("throttled")]
    assert away.unavailable is not None
    assert away.unavailable.retry_after == believed
    assert await _wait_of_one_that_is_asked(secondary.down) == believed


async def _wait_of_one_that_is_asked(away: Unavailable) -> timedelta | None:
    class Away(ScriptedSecondary):
        async def highest_position(self) -> int:
            raise away

    with pytest.raises(Unavailable, match="throttled") as caught:
        await highest_of(Away(), timedelta(seconds=1))
    return caught.value.retry_after


@pytest.mark.parametrize("said", [None, "7", 7.0, -1, 2**63])
async def test_a_highest_position_that_is_none_says_nothing(said: Any) -> None:
    """Promise 7: it would be compared with the primary's, and asked of it."""

    class Odd(ScriptedSecondary):
        async def highest_position(self) -> int:
            return said

    with pytest.raises(Unavailable, match="no_position"):
        await highest_of(Odd(), timedelta(seconds=1))


@pytest.mark.parametrize("known", [None, 3, "ok", {0: Applied()}, iter([Applied()]), [Applied, "ok"]])
async def test_what_was_known_in_other_words_is_not_known(known: Any) -> None:
    """Promise 7: the secondary is away all the same."""
    secondary = ScriptedSecondary()
    secondary.down = Unavailable("refused", "", known=known)
    away = await ended(secondary, in_hand("ab"))
    assert away.results == [Released("refused")] * 2
    assert away.unavailable is not None


class Mute(Unavailable):
    """Its author forgot what the base class keeps."""

    def __init__(self) -> None:
        Exception.__init__(self)


async def test_an_unavailable_without_words_is_an_error_like_any_other() -> None:
    """Promise 7: it explains nothing, so the event that is met with it fails alone."""
    secondary = ScriptedSecondary()
    secondary.always("a", Mute())
    found = await ended(secondary, in_hand("ab"))
    assert [getattr(result, "code", "") for result in found.results] == ["adapter_error", ""]


LEFT_ALONE = """
select (select count(*) from outbox_hold where backend_id = 'busy' and next_attempt_at > now() + interval '20 seconds')
     + (select count(*) from outbox_secondary where backend_id = 'throttled'
        and breaker_until > now() + interval '20 seconds')
"""


async def test_no_wait_in_another_form_ends_the_relay(primary: AsyncEngine) -> None:
    """Promise 7: HTTP's Retry-After is in seconds, so an adapter may hand it on as it came; the others go on."""
    busy, throttled, away, well = (ScriptedSecondary(name) for name in ("busy", "throttled", "away", "well"))
    manager = manager_of(primary, busy, throttled, away, well, retry_max=30)
    await manager.register()
    seconds: Any = 30
    nothing: Any = None
    busy.always("1", Retry("busy", after=seconds))
    throttled.down = Unavailable("throttled", "", retry_after=seconds)
    away.script("1", Unavailable("refused", "", known=nothing))
    await write(manager, change("1"))
    async with running(manager.relay()):
        await eventually(lambda: _are_left_alone(primary, 2))
        await write(manager, change("2"))
        await eventually(lambda: len(well.held) == len(away.held) == 2)


async def _are_left_alone(primary: AsyncEngine, secondaries: int) -> bool:
    return bool(await value(primary, LEFT_ALONE) == secondaries)


# A cancellation that the adapter makes something else of


class Panic(BaseException):
    """No `Exception`, as a panic of a Rust extension."""


async def _in_a_group(call: Cancelled) -> Any:
    async def driver() -> None:
        await _own_error(call)

    async with asyncio.TaskGroup() as group:
        group.create_task(driver())


async def _own_error(call: Cancelled) -> Any:
    try:
        return await call()
    except asyncio.CancelledError:
        raise ConnectionAbortedError from None


async def _panic(call: Cancelled) -> Any:
    try:
        return await call()
    except asyncio.CancelledError:
        raise Panic from None


async def _away(call: Cancelled) -> Any:
    try:
        return await call()
    except asyncio.CancelledError:
        raise Unavailable("interrupted", "nobody knows") from None


TURNS = [_away, _in_a_group, _own_error, _panic]


class Turning(ScriptedSecondary):
    """One that makes something else of a cancellation."""

    def __init__(self, backend_id: str = "search", turn: Callable[[Cancelled], Any] = _own_error) -> None:
        super().__init__(backend_id)
        self.turn = turn

    async def apply(self, batch: Sequence[SyncEvent]) -> Any:
        return await self.turn(lambda: super(Turning, self).apply(batch))


class CheckedTurning(Turning, CheckedSecondary):
    """One that can also be asked whether it is there."""


@pytest.fixture(params=TURNS, ids=lambda turn: turn.__name__)
def turn(request: pytest.FixtureRequest) -> Any:
    return request.param


async def test_a_hang_that_ends_in_another_error_ends_by_its_deadline(turn: Any) -> None:
    """Promise 7: it is not asked for halves, which nothing would end; it is away, as one that lets itself be ended."""
    secondary = Turning(turn=turn)
    secondary.hang()
    hung = await ended(secondary, in_hand("abc"))
    assert hung.results == [Released("timeout")] * 3
    assert hung.unavailable is not None
    assert len(secondary.calls) == 1


async def test_a_hang_of_one_event_that_ends_in_another_error_is_a_hang(turn: Any) -> None:
    """Promise 8: it is not the adapter's error, so it spends no attempt."""
    secondary = Turning(turn=turn)
    secondary.hang()
    assert (await ended(secondary, in_hand("a"))).results == [Released("timeout")]


async def test_a_hang_that_ends_in_another_error_is_blamed_where_the_secondary_answers(turn: Any) -> None:
    """Design, retry: the same rule as for one that lets itself be ended."""
    secondary = CheckedTurning(turn=turn)
    secondary.hang()
    hung = await ended(secondary, in_hand("ab"))
    assert [getattr(result, "code", "") for result in hung.results] == ["timeout"] * 2
    assert all(isinstance(result, Retry) for result in hung.results)
    assert (hung.unavailable, len(secondary.calls), secondary.checks) == (None, 1, 1)


async def test_who_is_cancelled_is_cancelled_whatever_the_adapter_makes_of_it(turn: Any) -> None:
    """L6: a relay that must stop hands back what it has; nobody is asked for halves, nor blamed."""
    secondary = Turning(turn=turn)
    secondary.hang()
    dispatching = asyncio.create_task(dispatch(secondary, in_hand("ab"), timedelta(seconds=30)))
    await eventually(lambda: secondary.running)
    dispatching.cancel()
    await asyncio.wait({dispatching}, timeout=3)
    secondary.release()
    assert dispatching.cancelled()
    assert len(secondary.calls) == 1


class Hanging(CheckedSecondary):
    """One whose check hangs too."""

    async def check(self) -> None:
        self.checks += 1
        await _own_error(asyncio.Event().wait)


async def test_a_check_that_makes_another_error_of_a_cancellation_does_not_hide_it() -> None:
    """L6: nor when it is asked after a hang whether it is there."""
    secondary = Hanging()
    secondary.hang()
    dispatching = asyncio.create_task(dispatch(secondary, in_hand("a"), timedelta(seconds=0.05)))
    await eventually(lambda: secondary.checks)
    dispatching.cancel()
    await asyncio.wait({dispatching}, timeout=3)
    assert dispatching.cancelled()


async def _busy(call: Cancelled) -> Any:
    try:
        return await call()
    except asyncio.CancelledError:
        return [Retry("busy")]


async def _done(call: Cancelled) -> Any:
    try:
        return await call()
    except asyncio.CancelledError:
        return [Applied()]


CALMS: list[tuple[Any, Result, bool]] = [(_busy, Retry("busy"), False), (_done, Applied(), True)]


@pytest.mark.parametrize(("calm", "answer", "log_order"), CALMS, ids=["the other half", "the next wave"])
async def test_one_that_answers_once_it_is_cancelled_is_asked_nothing_more(
    calm: Any, answer: Result, log_order: bool
) -> None:
    """Promise 7: its answer counts, and nothing would end what it was asked next."""
    secondary = Turning(turn=calm)
    secondary.script("a", *([Hang(), Hang()] if log_order else [RuntimeError(), Hang()]))
    secondary.script("b", None, Hang())
    attempt = in_hand("aa" if log_order else "ab", log_order=log_order)
    assert (await ended(secondary, attempt)).results == [answer, Released("timeout")]


async def test_a_hang_that_ends_in_another_error_costs_no_attempt(primary: AsyncEngine, turn: Any) -> None:
    """Promise 8: the breaker counts it as away, and its relay carries on."""
    secondary = Turning(turn=turn)
    manager = manager_of(primary, secondary, lease=1.2, attempt_deadline=0.45)
    await manager.register()
    secondary.hang()
    await write(manager, change("1"), change("2"), change("3"))
    carrying = asyncio.create_task(manager.relay().run_once("search"))
    await asyncio.wait({carrying}, timeout=5)
    in_time = carrying.done()
    secondary.release()
    assert in_time, "it goes on without a deadline"
    assert await carrying == 3
    assert [row["attempts"] for row in await rows(primary, "select attempts from outbox_hold")] == [0] * 3
    assert await value(primary, "select breaker_failures from outbox_secondary") == 1
