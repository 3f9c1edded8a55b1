"""What a secondary's call may come to under the failure lab: each is given the real call, and has one batch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from outbox.errors import Unavailable
from outbox.event import SyncEvent
from outbox.secondaries.base import Outcome
from outbox.testing.lab_ground import Apply, Fault

__all__ = [
    "Broken",
    "cutting",
    "deaf",
    "half_answered",
    "known_half",
    "pausing",
    "raising",
    "refused",
    "telling",
    "timing",
    "twice",
]


class Broken(Exception):
    """What an adapter raises that has not thought of it."""


async def twice(apply: Apply, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
    """Apply twice; the second answer counts."""
    await apply(batch)
    return await apply(batch)


async def deaf(apply: Apply, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
    """Apply, and lose the answer."""
    await apply(batch)
    raise Broken


async def half_answered(apply: Apply, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
    """Apply all, and answer for the first half."""
    return (await apply(batch))[: len(batch) // 2]


async def known_half(apply: Apply, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
    """Apply the first half, then be gone, saying how far it came."""
    raise Unavailable("gone", "by the failure lab", known=await apply(batch[: len(batch) // 2]))


def refused() -> Unavailable:
    """What a secondary that cannot be asked raises."""
    return Unavailable("refused", "by the failure lab")


def raising(error: Callable[[], Exception]) -> Fault:
    """Apply nothing, and raise."""

    async def fault(_apply: Apply, _batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        raise error()

    return fault


def telling(began: asyncio.Event) -> Fault:
    """Say that the call began, and apply."""

    async def fault(apply: Apply, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        began.set()
        return await apply(batch)

    return fault


def pausing(half: asyncio.Event, rest: asyncio.Event) -> Fault:
    """Apply half, say so, and do the rest when told to."""

    async def fault(apply: Apply, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        middle = len(batch) // 2
        try:
            first = await apply(batch[:middle])
        finally:
            half.set()
        await rest.wait()
        return [*first, *await apply(batch[middle:])]

    return fault


def timing(took: list[float]) -> Fault:
    """Apply, and note how long it took, in seconds."""

    async def fault(apply: Apply, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        began = time.monotonic()
        outcomes = await apply(batch)
        took.append(time.monotonic() - began)
        return outcomes

    return fault


def cutting(after: float) -> Fault:
    """Cancel the call after so many seconds; what it answers nevertheless is its answer."""

    async def fault(apply: Apply, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        applying = asyncio.ensure_future(apply(batch))
        await asyncio.wait({applying}, timeout=after)
        applying.cancel()
        return await applying

    return fault
