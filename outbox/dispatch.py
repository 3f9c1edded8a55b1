"""Dispatch: hand a batch to its secondary, outside any transaction, and turn whatever happens into results.

A batch with contents too large to be in memory at once goes in parts; see `parts.py`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import TypeVar

import msgspec

from outbox.attempt import Attempt, Refused, Released, Result, Superseded
from outbox.errors import Unavailable
from outbox.event import Operation, SyncEvent
from outbox.parts import Budget, Events, Parts
from outbox.secondaries.base import Applied, Checkable, Outcome, Positioned, Rejected, Retry, Secondary, Stale
from outbox.token import HIGHEST_POSITION
from outbox.tracing import traced

__all__ = ["Dispatched", "answers", "ask", "dispatch", "highest_of"]

_log = logging.getLogger("outbox.dispatch")

_OPERATIONS = frozenset(Operation)
_UNSENT = frozenset((Superseded, Released))
_WITHOUT_A_WAIT = frozenset((Applied, Stale, Rejected))
_UNKNOWN_OUTCOME = Retry("unknown_outcome", "the secondary's answer does not match the batch")
# Written by a newer version: a newer relay will know it, so it must not die here.
_UNKNOWN_OPERATION = Retry("unknown_operation", "this relay does not know the event's operation")
_HUNG = Retry("timeout", "no answer within the attempt's deadline though the secondary is reachable")
_CHECK_TIMEOUT = 2.0
_LONGEST_WAIT = timedelta.max // timedelta(seconds=1)

_Answer = TypeVar("_Answer")


class Dispatched(msgspec.Struct, frozen=True):
    """One result per event of the attempt, in its order; `unavailable` says why when the secondary was not there."""

    results: Sequence[Result]
    unavailable: Unavailable | None = None


@traced
async def dispatch(
    secondary: Secondary, attempt: Attempt, deadline: timedelta, budget: Budget | None = None
) -> Dispatched:
    """Give every event of the attempt a result, within `deadline`; only cancellation is ever raised.

    In state order only the newest event of a key is sent. In log order events go out in waves of one per key, and
    a failure keeps the key's later events back. When the secondary is unavailable, what was not applied is released.
    An attempt with contents left out needs a `budget`, and has the `deadline` for each of its parts.
    """
    events = attempt.events
    results: list[Result | None] = [None] * len(events)
    waves = _waves(events, results) if attempt.log_order else iter([_newest(events, results)])
    apply = partial(_bisect, secondary, results)
    try:
        if attempt.left_out:
            assert budget is not None, "whoever loads an attempt in parts can fetch them"
            await Parts(attempt, results, deadline, budget).send(waves, apply)
        else:
            async with asyncio.timeout(deadline.total_seconds()):
                for wave in waves:
                    await apply(events, wave)
    except TimeoutError:
        return await _after_timeout(secondary, results)
    except Unavailable as error:
        return Dispatched(_filled(results, Released(error.code)), error)
    return _judged(attempt, _filled(results, Released()))


async def highest_of(secondary: Positioned, deadline: timedelta) -> int:
    """Return the highest position a secondary holds; raise `Unavailable` when it does not say so within `deadline`."""
    highest: object = await ask(secondary.highest_position, deadline)
    if isinstance(highest, int) and 0 <= highest <= HIGHEST_POSITION:
        return highest
    raise Unavailable("no_position", "what it says is its highest position is none")


async def answers(secondary: Checkable, deadline: timedelta) -> None:
    """Return when a secondary answers; raise `Unavailable` when it does not within `deadline`."""
    await ask(secondary.check, deadline)


async def ask(question: Callable[[], Awaitable[_Answer]], deadline: timedelta) -> _Answer:
    """Return what an adapter answers; raise `Unavailable` for whatever else it does, unless we are cancelled."""
    try:
        async with asyncio.timeout(deadline.total_seconds()):
            return await _believed(question)
    except Unavailable:
        raise
    except TimeoutError:
        raise Unavailable("timeout", "no answer in time") from None
    except BaseException as error:
        # As with a batch: neither its text nor its traceback's values, which may quote content.
        if _not_of_the_adapter(error):
            raise
        _stop_if_cancelled()
        raise Unavailable("adapter_error", f"the adapter raised {type(error).__name__}") from None


def _newest(events: list[SyncEvent], results: list[Result | None]) -> Sequence[int]:
    """Choose the last event of each key; the others are superseded."""
    if len({event.resource_id for event in events}) == len(events):
        return _known(events, range(len(events)), results)
    last = {event.key: index for index, event in enumerate(events)}
    chosen = set(last.values())
    for index in range(len(events)):
        if index not in chosen:
            results[index] = Superseded()
    return _known(events, sorted(chosen), results)


def _waves(events: list[SyncEvent], results: list[Result | None]) -> Iterator[Sequence[int]]:
    """Yield batches of at most one event per key, in position order; a key that failed gets no further event."""
    waiting = list(range(len(events)))
    while waiting:
        heads: dict[tuple[str, str, str], int] = {}
        for index in waiting:
            heads.setdefault(events[index].key, index)
        yield _known(events, list(heads.values()), results)
        failed = {key for key, index in heads.items() if not isinstance(results[index], (Applied, Stale))}
        sent = set(heads.values())
        waiting = [index for index in waiting if index not in sent and events[index].key not in failed]


def _known(events: list[SyncEvent], chosen: Sequence[int], results: list[Result | None]) -> Sequence[int]:
    unknown = {index for index in chosen if events[index].operation not in _OPERATIONS}
    for index in unknown:
        results[index] = _UNKNOWN_OPERATION
    return [index for index in chosen if index not in unknown] if unknown else chosen


async def _bisect(secondary: Secondary, results: list[Result | None], events: Events, chosen: Sequence[int]) -> None:
    """Apply a batch; if the adapter fails without saying why, apply its halves: one event cannot fail others."""
    if not chosen:
        return
    try:
        await _apply(secondary, results, events, chosen)
    except (Unavailable, TimeoutError):
        raise
    except BaseException as error:
        # The one place that catches all: it turns it into an outcome. A panic of a Rust extension is no `Exception`.
        if _not_of_the_adapter(error):
            raise
        _stop_if_cancelled()
        if len(chosen) == 1:
            results[chosen[0]] = _unexplained(secondary, error)
            return
        await _bisect(secondary, results, events, chosen[: len(chosen) // 2])
        await _bisect(secondary, results, events, chosen[len(chosen) // 2 :])


async def _apply(secondary: Secondary, results: list[Result | None], events: Events, chosen: Sequence[int]) -> None:
    """Ask for a batch once, and note what became of its events as far as the secondary says so."""
    _stop_if_cancelled()
    try:
        answer = await _believed(partial(secondary.apply, [events[index] for index in chosen]))
    except Unavailable as error:
        for index, known in zip(chosen, error.known, strict=False):
            results[index] = _outcome(known)
        _stop_if_cancelled()
        raise
    for index, outcome in zip(chosen, _trusted(answer, len(chosen)), strict=True):
        results[index] = outcome


def _not_of_the_adapter(error: BaseException) -> bool:
    """Whether we are cancelled ourselves, or the process is told to end."""
    if isinstance(error, asyncio.CancelledError):
        return _cancelled()
    return isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))


def _stop_if_cancelled() -> None:
    """Raise our cancellation, whatever an adapter made of it: a deadline fires once, and would not end another call."""
    if _cancelled():
        raise asyncio.CancelledError from None


def _cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _believed(ask: Callable[[], Awaitable[_Answer]]) -> _Answer:
    """Ask an adapter; of an `Unavailable` keep what is of its type, as the rest would end the relay for everybody."""
    try:
        return await ask()
    except Unavailable as error:
        known = error.known if isinstance(error.known, (list, tuple)) else ()
        raise Unavailable(error.code, error.problem, retry_after=_wait(error.retry_after), known=known) from None


def _trusted(answer: object, expected: int) -> Sequence[Outcome | Refused]:
    """An answer of another length, or in other words, says nothing about anybody."""
    said = answer if isinstance(answer, (list, tuple)) else ()
    if len(said) == expected and _WITHOUT_A_WAIT.issuperset(map(type, said)):
        # Nearly always, and for every event: one look in C.
        return said
    outcomes = [outcome for each in said if (outcome := _outcome(each)) is not None]
    if len(outcomes) == len(said) == expected:
        return outcomes
    return [_UNKNOWN_OUTCOME] * expected


def _outcome(said: object) -> Outcome | Refused | None:
    """Return an outcome with a wait that is one, None for any other word."""
    if type(said) is Retry:
        return (Refused if said.blameless is True else Retry)(said.code, said.problem, _wait(said.after))
    return said if isinstance(said, (Applied, Stale, Rejected)) and type(said) in _WITHOUT_A_WAIT else None


def _wait(asked: object) -> timedelta | None:
    """Return the wait that was asked for.

    A number is seconds, since HTTP's Retry-After is; a negative or endless one, and anything else, asks for nothing.
    """
    if isinstance(asked, (int, float)) and 0 <= asked < math.inf:
        return timedelta(seconds=min(asked, _LONGEST_WAIT))
    return asked if isinstance(asked, timedelta) else None


def _unexplained(secondary: Secondary, error: BaseException) -> Retry:
    # Neither the error's text nor its traceback's values: both may quote content.
    kind = type(error).__name__
    _log.warning("secondary %s raised %s on a single event", secondary.backend_id, kind)
    return Retry("adapter_error", f"the adapter raised {kind}")


async def _after_timeout(secondary: Secondary, results: list[Result | None]) -> Dispatched:
    """A hang is the secondary's fault, unless it still answers: then something in the batch made it hang."""
    if isinstance(secondary, Checkable):
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT):
                await secondary.check()
        except BaseException as error:
            # However it fails to answer, it is not there.
            if _not_of_the_adapter(error):
                raise
            _stop_if_cancelled()
            _log.info("secondary %s does not answer a check (%s)", secondary.backend_id, type(error).__name__)
        else:
            return Dispatched(_filled(results, _HUNG))
    hung = Unavailable("timeout", "no answer within the attempt's deadline")
    return Dispatched(_filled(results, Released(hung.code)), hung)


def _judged(attempt: Attempt, results: list[Result]) -> Dispatched:
    """Nothing but refusals, and one of them of a key that had not failed yet: then no part of the secondary works.

    Who was refused before says nothing of the rest: where a part is lost for days, it would stop all others.
    """
    if Refused not in map(type, results):
        return Dispatched(results)
    answered = [(event, each) for event, each in zip(attempt.events, results, strict=True) if type(each) not in _UNSENT]
    refused = [each for _, each in answered if isinstance(each, Refused)]
    if len(refused) < len(answered) or all(attempt.failed_before(event.key) for event, _ in answered):
        return Dispatched(results)
    return Dispatched(results, Unavailable(refused[0].code, refused[0].problem, retry_after=refused[0].after))


def _filled(results: list[Result | None], rest: Result) -> list[Result]:
    return [rest if result is None else result for result in results]
