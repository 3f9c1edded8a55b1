"""Gates: run what the product runs, and stop it before the statements that hold given words."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import await_only

COMMIT = "commit"


class Gates:
    """An actor's engine. One course at a time runs on it, from gate to gate."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.heard: list[str] = []
        # Words that no statement held so far: a gate that nobody meets stops nobody, and all orders are one.
        self.unmet: set[str] = set()
        self._met: set[str] = set()
        self._words: deque[str] = deque()
        self._reached, self._opened = asyncio.Event(), asyncio.Event()
        event.listen(engine.sync_engine, "before_cursor_execute", lambda *sent: self._pass_by(sent[2]))
        event.listen(engine.sync_engine, "commit", lambda _connection: self._pass_by(COMMIT))

    def course(
        self, words: Sequence[str], work: Callable[[], Coroutine[Any, Any, object]], *, never: Collection[str] = ()
    ) -> list[Callable[[], Coroutine[Any, Any, object]]]:
        """Return steps: one to each gate in turn, and one to the end. Where a gate is not met, a step goes further.

        Each must be met in some order of a family, but those that are `never` in this variant.
        """
        course = _Course(self, work)
        self._words = deque(words)
        self.unmet |= set(words) - set(never) - self._met
        return [course.go_on] * (len(words) + 1)

    async def go_on(self, running: asyncio.Task[object]) -> None:
        """Open the gate, and return when the next is reached or all is over."""
        self._reached.clear()
        self.heard.clear()
        self._opened.set()
        reached = asyncio.create_task(self._reached.wait())
        await asyncio.wait({running, reached}, return_when=asyncio.FIRST_COMPLETED)
        reached.cancel()

    def _pass_by(self, statement: str) -> None:
        self.heard.append(statement)
        if self._words and self._words[0] in statement:
            self._met.add(self._words[0])
            self.unmet.discard(self._words.popleft())
            self._opened = asyncio.Event()
            self._reached.set()
            await_only(self._opened.wait())


class _Course:
    def __init__(self, gates: Gates, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        self._gates = gates
        self._work = work
        self._running: asyncio.Task[object] | None = None

    async def go_on(self) -> object:
        if self._running is None:
            self._running = asyncio.create_task(self._work())
        try:
            await self._gates.go_on(self._running)
        except asyncio.CancelledError:
            self._running.cancel()
            raise
        return self._running.result() if self._running.done() else None
