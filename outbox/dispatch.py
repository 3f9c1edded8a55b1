"""Dispatch: hand a batch to its secondary, outside any transaction, and turn whatever happens into results."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta

import msgspec

from outbox.attempt import Attempt, Claimed, Released, Result, Superseded
from outbox.errors import Unavailable
from outbox.event import Operation, SyncEvent
from outbox.secondaries.base import Applied, Checkable, Outcome, Rejected, Retry, Secondary, Stale

__all__ = ["Dispatched", "dispatch"]

_log = logging.getLogger("outbox.dispatch")

_OPERATIONS = frozenset(Operation)
_UNKNOWN = Retry("unknown_outcome", "the secondary's answer does not match the batch")
_CHECK_TIMEOUT = 2.0


class Dispatched(msgspec.Struct, frozen=True):
    """One result per position, and how the secondary was found: None when it was there."""

    results: dict[int, Result]
    unavailable: Unavailable | None = None


async def dispatch(secondary: Secondary, attempt: Attempt, deadline: timedelta) -> Dispatched:
    """Give every event of the attempt a result, within `deadline`; only cancellation is ever raised.

    In state order only the newest event of a key is sent. In log order events go out in waves of one per key, and
    a failure keeps the key's later events back. When the secondary is unavailable, what was not applied is released.
    """
    results: dict[int, Result] = {}
    try:
        async with asyncio.timeout(deadline.total_seconds()):
            for wave in _waves(attempt, results):
                await _send(secondary, wave, results)
    except TimeoutError:
        return await _after_timeout(secondary, attempt, results)
    except Unavailable as error:
        return _released(attempt, results, error)
    return Dispatched(results)


def _waves(attempt: Attempt, results: dict[int, Result]) -> Sequence[list[SyncEvent]] | _Waves:
    return _Waves(attempt.claimed, results) if attempt.log_order else [_newest(attempt.claimed, results)]


def _newest(claimed: list[Claimed], results: dict[int, Result]) -> list[SyncEvent]:
    newest = {each.event.key: each.event for each in claimed}
    chosen = {event.position for event in newest.values()}
    results.update({each.position: Superseded() for each in claimed if each.position not in chosen})
    return [each.event for each in claimed if each.position in chosen]


class _Waves:
    """Batches of at most one event per key, in position order; a key that failed gets no further event."""

    def __init__(self, claimed: list[Claimed], results: dict[int, Result]) -> None:
        self._waiting = [each.event for each in claimed]
        self._results = results
        self._failed: set[tuple[str, str, str]] = set()
        self._sent: list[SyncEvent] = []

    def __iter__(self) -> _Waves:
        return self

    def __next__(self) -> list[SyncEvent]:
        self._drop_followers_of_failures()
        if not self._waiting:
            raise StopIteration
        heads = {event.key: event for event in reversed(self._waiting)}
        self._sent = [event for event in self._waiting if heads[event.key] is event]
        self._waiting = [event for event in self._waiting if heads[event.key] is not event]
        return self._sent

    def _drop_followers_of_failures(self) -> None:
        self._failed |= {
            event.key for event in self._sent if not isinstance(self._results[_position(event)], (Applied, Stale))
        }
        for event in self._waiting:
            if event.key in self._failed:
                self._results[_position(event)] = Released()
        self._waiting = [event for event in self._waiting if event.key not in self._failed]


async def _send(secondary: Secondary, batch: list[SyncEvent], results: dict[int, Result]) -> None:
    known = [event for event in batch if event.operation in _OPERATIONS]
    # Written by a newer version: a newer relay will know it, so it must not die here.
    unknown = Retry("unknown_operation", "this relay does not know the event's operation")
    if len(known) < len(batch):
        results.update({_position(event): unknown for event in batch if event not in known})
    if known:
        await _bisect(secondary, known, results)


async def _bisect(secondary: Secondary, batch: list[SyncEvent], results: dict[int, Result]) -> None:
    """Apply a batch; if the adapter fails without saying why, apply its halves: one event cannot fail others."""
    try:
        outcomes = await secondary.apply(batch)
    except (Unavailable, TimeoutError):
        raise
    except Exception as error:  # noqa: BLE001 - the one place that catches all: it turns it into an outcome
        if len(batch) == 1:
            results[_position(batch[0])] = _unexplained(secondary, error)
            return
        await _bisect(secondary, batch[: len(batch) // 2], results)
        await _bisect(secondary, batch[len(batch) // 2 :], results)
        return
    for event, outcome in zip(batch, _trusted(outcomes, len(batch)), strict=True):
        results[_position(event)] = outcome


def _trusted(outcomes: Sequence[Outcome], expected: int) -> Sequence[Outcome]:
    """An answer of another length says nothing about anybody."""
    if len(outcomes) != expected or not all(isinstance(each, (Applied, Stale, Retry, Rejected)) for each in outcomes):
        return [_UNKNOWN] * expected
    return outcomes


def _unexplained(secondary: Secondary, error: Exception) -> Retry:
    # Neither the error's text nor its traceback's values: both may quote content.
    kind = type(error).__name__
    _log.warning("secondary %s raised %s on a single event", secondary.backend_id, kind)
    return Retry("adapter_error", f"the adapter raised {kind}")


async def _after_timeout(secondary: Secondary, attempt: Attempt, results: dict[int, Result]) -> Dispatched:
    """A hang is the secondary's fault, unless it still answers: then something in the batch made it hang."""
    if isinstance(secondary, Checkable):
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT):
                await secondary.check()
        except (TimeoutError, Unavailable):
            pass
        else:
            hung = Retry("timeout", "no answer within the attempt's deadline though the secondary is reachable")
            return Dispatched({each.position: results.get(each.position, hung) for each in attempt.claimed})
    return _released(attempt, results, Unavailable("timeout", "no answer within the attempt's deadline"))


def _released(attempt: Attempt, results: dict[int, Result], error: Unavailable) -> Dispatched:
    released = Released(error.code)
    return Dispatched({each.position: results.get(each.position, released) for each in attempt.claimed}, error)


def _position(event: SyncEvent) -> int:
    assert event.position is not None
    return event.position
