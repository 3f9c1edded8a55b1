"""Verdict: what becomes of each key of an attempt, given what its secondary said."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta

import msgspec

from outbox.attempt import Attempt, Held, Lost, Refused, Released, Result, Superseded
from outbox.event import SyncEvent
from outbox.retry import RetryPolicy
from outbox.secondaries.base import Rejected, Retry

__all__ = ["OWED", "Kept", "Key", "printable_code", "verdicts"]

_LONGEST_ERROR = 1024
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]+")
_ALONE_AFTER_LOST = 2

Key = tuple[str, str, str]
_FRESH = Held(0, 0, None, None)
OWED = (Retry, Rejected, Released, Refused, Lost)


class Kept(msgspec.Struct, frozen=True):
    """One key that stays held: what it owes, and when it is due. `delay` is None for a dead key.

    `anew` says that the time of its first failure is now, and not what its hold remembers.
    """

    key: Key
    event_ids: list[int]
    oldest_id: int
    owed_since: datetime
    state: str
    attempts: int
    lost: int
    alone: bool
    anew: bool
    delay: float | None
    error_code: str | None = None
    error: str | None = None


def verdicts(attempt: Attempt, results: Sequence[Result], policy: RetryPolicy) -> tuple[list[Kept], list[Key]]:
    """Return the keys that are held from now on, and the held keys that are done."""
    kept: list[Kept] = []
    done: list[Key] = []
    by_key: dict[Key, tuple[list[SyncEvent], list[Result]]] = {}
    for event, result in zip(attempt.events, results, strict=True):
        events, found = by_key.setdefault(event.key, ([], []))
        events.append(event)
        found.append(result)
    for key, (events, found) in by_key.items():
        decision = _keep(key, events, found, attempt.held.get(key, _FRESH), policy)
        if decision is not None:
            kept.append(decision)
        elif key in attempt.held:
            done.append(key)
    return kept, done


def _keep(
    key: Key, events: Sequence[SyncEvent], results: Sequence[Result], held: Held, policy: RetryPolicy
) -> Kept | None:
    """Decide what becomes of a key, given its events in hand in order; None when all of them are done.

    The first event still owed decides: a release or a refusal costs nothing, a failure or a loss spends one attempt.
    """
    owed = [index for index, result in enumerate(results) if isinstance(result, OWED)]
    if not owed:
        return None
    head = owed[0]
    # What was superseded is not done before the newer event is.
    first = 0 if all(isinstance(result, Superseded) for result in results[:head]) else head
    if first > 0:
        # Attempts belong to the event at the head; one that got there just now starts afresh.
        held = _FRESH
    positions = [events[index].position or 0 for index in owed]
    oldest = held.oldest_id or events[first].position or 0
    since = events[head].created_at
    assert since is not None, "a recorded event has its time"
    alone = held.lost >= _ALONE_AFTER_LOST
    # What failed before is a failure still: whoever looks for it finds it, also while its relays are stopped.
    state = "released" if held.failing_for is None else "retrying"
    kept = Kept(key, positions, oldest, since, state, held.attempts, held.lost, alone, anew=False, delay=0.0)
    result = results[head]
    return _failed(kept, held, result, policy) if isinstance(result, (Retry, Rejected, Refused, Lost)) else kept


def _failed(kept: Kept, held: Held, result: Retry | Rejected | Refused | Lost, policy: RetryPolicy) -> Kept:
    blamed = not isinstance(result, Refused)
    lost = held.lost + isinstance(result, Lost)
    # What it was refused for before is no failure of its own.
    since = None if blamed and held.attempts == 0 else held.failing_for
    delay = _delay(result, held.attempts + blamed, since or timedelta(0), policy)
    return msgspec.structs.replace(
        kept,
        state="dead" if delay is None else "retrying",
        attempts=held.attempts + blamed,
        lost=lost,
        # What may have killed or hung its relay is tried again with nobody beside it.
        alone=lost >= _ALONE_AFTER_LOST or (blamed and result.code == "timeout"),
        anew=since is None,
        delay=None if delay is None else delay.total_seconds(),
        error_code=printable_code(result.code),
        error=_printable(result.problem, _LONGEST_ERROR),
    )


def _delay(
    result: Retry | Rejected | Refused | Lost, attempts: int, failing_for: timedelta, policy: RetryPolicy
) -> timedelta | None:
    if isinstance(result, Rejected):
        return None
    if isinstance(result, Refused):
        return policy.patience(failing_for, result.after)
    return policy.delay(attempts, failing_for, result.after if isinstance(result, Retry) else None)


def printable_code(code: object) -> str | None:
    """Return a code as it may be stored and shown."""
    return None if code is None else _printable(code, 64)


def _printable(problem: object, longest: int) -> str:
    """Return text without what terminals obey or PostgreSQL refuses; what is no text says only its type."""
    text = problem if isinstance(problem, str) else type(problem).__name__
    return _UNPRINTABLE.sub(" ", text[: 4 * longest])[:longest]
