"""Parts: an attempt whose contents are too large to be in memory at once goes in parts, each fetched before it goes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple

import msgspec

from outbox.attempt import Attempt, Released, Result
from outbox.event import SyncEvent

__all__ = ["Budget", "Events", "Parts"]

Events = Sequence[SyncEvent] | Mapping[int, SyncEvent]
"""Events by their index in the attempt."""


class Budget(NamedTuple):
    """How many bytes of content may be in memory, and who fetches, by position, what was left out for their sake.

    `fetch` returns none when the attempt is no longer ours.
    """

    batch_bytes: int
    fetch: Callable[[Sequence[int]], Awaitable[Mapping[int, str]]]


class Parts:
    """An attempt on its way in parts, with the results of its events."""

    def __init__(self, attempt: Attempt, results: list[Result | None], deadline: timedelta, budget: Budget) -> None:
        self._events = attempt.events
        self._results = results
        self._seconds = deadline.total_seconds()
        self._fetch = budget.fetch
        self._left_out = {
            index: attempt.left_out[event.position]
            for index, event in enumerate(attempt.events)
            if event.position in attempt.left_out
        }
        here = sum(len(event.content.encode()) for event in attempt.events if event.content is not None)
        self._room = budget.batch_bytes - here

    async def send(
        self, waves: Iterable[Sequence[int]], apply: Callable[[Events, Sequence[int]], Awaitable[None]]
    ) -> None:
        """Apply them one after the other, each part within the deadline, until the attempt is no longer ours."""
        for wave in waves:
            for part in self._cut(wave):
                if not await self._send(part, apply):
                    return

    def _cut(self, wave: Sequence[int]) -> Iterator[Sequence[int]]:
        """Yield what is here already, so that it waits for nothing large, then what there is room for, in order."""
        if here := [index for index in wave if index not in self._left_out]:
            yield here
        part: list[int] = []
        room = self._room
        for index in wave:
            if index not in self._left_out:
                continue
            if self._left_out[index] > room and part:
                yield part
                part, room = [], self._room
            part.append(index)
            room -= self._left_out[index]
        if part:
            yield part

    async def _send(self, part: Sequence[int], apply: Callable[[Events, Sequence[int]], Awaitable[None]]) -> bool:
        """Apply one part; say whether the attempt is still ours. Its contents are gone before the next one's come."""
        events: Events = self._events
        if part[0] in self._left_out:
            events = await self._fetched(part)
            if not events:
                return False
            # What somebody deleted by hand meanwhile is released: whoever has it next finds nothing to send.
            part = list(events)
        try:
            async with asyncio.timeout(self._seconds):
                await apply(events, part)
        except TimeoutError:
            # Only what was out is to blame.
            for index in set(range(len(self._results))).difference(part):
                self._results[index] = self._results[index] or Released("timeout")
            raise
        return True

    async def _fetched(self, part: Sequence[int]) -> dict[int, SyncEvent]:
        positions = {self._events[index].position or 0: index for index in part}
        contents = await self._fetch(list(positions))
        return {
            index: msgspec.structs.replace(self._events[index], content=contents[position])
            for position, index in positions.items()
            if position in contents
        }
