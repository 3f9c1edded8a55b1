"""A real secondary in memory that does what a test tells it to, and remembers everything it was asked."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from outbox import MemorySecondary, SyncEvent
from outbox.errors import Unavailable
from outbox.secondaries.base import Applied, Outcome, Rejected, Retry, Stale

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Hang:
    """The call does not answer before `release()`; with `late` it has already taken effect."""

    late: bool = False


@dataclass(frozen=True)
class Broken:
    """The call takes effect, and then its answer is lost with this error."""

    error: BaseException


@dataclass(frozen=True)
class Exit:
    """The process ends at once, as by a crash."""

    code: int = 70


Step = Outcome | BaseException | Hang | Broken | Exit


@dataclass
class Call:
    """One `apply`: what was sent, when by ticks of one clock per secondary, and how it ended."""

    events: list[SyncEvent]
    started: int
    began: float
    finished: int | None = None
    ended: float | None = None
    ending: str = "running"
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def positions(self) -> list[int]:
        return [position_of(event) for event in self.events]

    @property
    def names(self) -> list[str]:
        return [event.resource_id for event in self.events]


class ScriptedSecondary(MemorySecondary):
    """Guarded by position like the memory secondary. Steps are told by resource id; without one an event is kept.

    An outcome as a step is answered for that event, which is then not kept. An exception is raised by the whole call
    before anything is kept. `down` refuses every call, `answer` may spoil what is answered, `pace` says how many
    seconds a call takes.
    """

    def __init__(self, backend_id: str = "scripted", *, pace: Callable[[], float] | None = None) -> None:
        super().__init__(backend_id)
        self.calls: list[Call] = []
        self.history: list[SyncEvent] = []
        self.down: Unavailable | None = None
        self.answer: Callable[[list[Outcome]], Any] = lambda outcomes: outcomes
        self._pace = pace
        self._next: dict[str, deque[Step | None]] = defaultdict(deque)
        self._always: dict[str, Step] = {}
        self._hang: Hang | None = None
        self._released = asyncio.Event()
        self._ticks = itertools.count()

    def script(self, resource_id: str, *steps: Step | None) -> None:
        """Do these, one at a time, the next times this resource comes (None: as usual); then `always`."""
        self._next[resource_id].extend(steps)

    def always(self, resource_id: str, step: Step) -> None:
        """Do this whenever the resource comes, until `heal`."""
        self._always[resource_id] = step

    def heal(self, resource_id: str) -> None:
        """Forget every step of a resource."""
        self._next.pop(resource_id, None)
        self._always.pop(resource_id, None)

    def hang(self, *, late: bool = False) -> None:
        """Let no call answer before `release`; with `late`, calls take effect first."""
        self._hang = Hang(late)
        self._released.clear()

    def release(self) -> None:
        """Let everything that hangs go on, and nothing hang from now on."""
        self._hang = None
        self._released.set()

    @property
    def running(self) -> list[Call]:
        """The calls that have not ended."""
        return [call for call in self.calls if call.finished is None]

    @property
    def sent(self) -> list[int]:
        """Every position of every call, in the order they came."""
        return [position for call in self.calls for position in call.positions]

    def sent_to(self, resource_id: str) -> list[int]:
        """The positions of one resource, in the order they came."""
        return [position_of(event) for call in self.calls for event in call.events if event.resource_id == resource_id]

    def calls_with(self, resource_id: str) -> list[Call]:
        """The calls that held an event of this resource."""
        return [call for call in self.calls if resource_id in call.names]

    async def apply(self, batch: Sequence[SyncEvent]) -> Any:
        call = Call(list(batch), next(self._ticks), time.monotonic())
        self.calls.append(call)
        try:
            call.outcomes = await self._answer(call.events)
            call.ending = "answered"
            return self.answer(call.outcomes)
        except BaseException as error:
            call.ending = type(error).__name__
            raise
        finally:
            call.finished, call.ended = next(self._ticks), time.monotonic()

    async def _answer(self, events: list[SyncEvent]) -> list[Outcome]:
        await self.note(events)
        steps = {event.position: step for event in events if (step := self.step_for(event)) is not None}
        hang = self._hang or next((step for step in steps.values() if isinstance(step, Hang)), None)
        if hang is not None and not hang.late:
            await self._released.wait()
        if self._pace is not None:
            await asyncio.sleep(self._pace())
        if self.down is not None:
            raise self.down
        for step in steps.values():
            if isinstance(step, Exit):
                os._exit(step.code)
            if isinstance(step, BaseException):
                raise step
        outcomes = await self.keep_all(events, steps)
        if hang is not None and hang.late:
            await self._released.wait()
        for step in steps.values():
            if isinstance(step, Broken):
                raise step.error
        return outcomes

    async def note(self, events: list[SyncEvent]) -> None:
        """Remember elsewhere what was asked, before anything else happens."""

    def step_for(self, event: SyncEvent) -> Step | None:
        """Return what to do with an event; None is as usual."""
        if steps := self._next.get(event.resource_id):
            return steps.popleft()
        return self._always.get(event.resource_id)

    async def keep_all(self, events: list[SyncEvent], steps: dict[int | None, Step]) -> list[Outcome]:
        """Keep what no step says otherwise of; return an outcome for each event."""
        return [self._kept(event, steps.get(event.position)) for event in events]

    def _kept(self, event: SyncEvent, step: Step | None) -> Outcome:
        if isinstance(step, (Applied, Stale, Retry, Rejected)):
            return step
        outcome = self._keep(event)
        if isinstance(outcome, Applied):
            self.history.append(event)
        return outcome


class CheckedSecondary(ScriptedSecondary):
    """One that can also be asked whether it is reachable; `unreachable` is what it answers then."""

    def __init__(self, backend_id: str = "scripted", *, pace: Callable[[], float] | None = None) -> None:
        super().__init__(backend_id, pace=pace)
        self.unreachable: Exception | None = None
        self.checks = 0

    async def check(self) -> None:
        self.checks += 1
        if self.unreachable is not None:
            raise self.unreachable


def position_of(event: SyncEvent) -> int:
    """The position, which every event that reached a secondary has."""
    assert event.position is not None
    return event.position


def overlaps(calls: Iterable[Call]) -> Iterator[tuple[Key, Call, Call]]:
    """Yield every key that was in two calls at the same time, with the two calls."""
    latest: dict[Key, Call] = {}
    for call in sorted(calls, key=lambda call: call.started):
        for event in call.events:
            before = latest.get(event.key)
            if before is not None and (before.finished is None or before.finished > call.started):
                yield event.key, before, call
            latest[event.key] = call


def by_key(events: Iterable[SyncEvent]) -> dict[Key, list[int]]:
    """The positions of each key, in the given order."""
    positions: dict[Key, list[int]] = defaultdict(list)
    for event in events:
        positions[event.key].append(position_of(event))
    return positions
