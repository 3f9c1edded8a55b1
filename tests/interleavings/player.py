"""Player: take the turns of an order one by one; who waits for a lock waits until somebody else's turn frees him."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, Protocol

from tests.interleavings.orders import ASKED, Family, Order

Step = Callable[[], Coroutine[Any, Any, object]]

_GLANCE = 0.005
_PATIENCE = 30.0
# Names of the steps after which the tables may look otherwise to others.
_SHOWS = ("commit", "end", "carry")


class Scene(Protocol):
    """One world in which one order is played, once."""

    def steps(self) -> Mapping[str, Iterable[Step]]:
        """What each actor does, in the order of the names that its family gives."""

    async def waits(self, actor: str) -> bool:
        """Whether an actor in the middle of a step cannot go on before somebody else does."""

    async def watch(self) -> None:
        """Look at what must hold in every snapshot; called after each step that may show others something new."""

    async def check(self) -> None:
        """Look at what must hold at the end."""


async def explore(family: Family, scene_of: Callable[[], Awaitable[Scene]]) -> None:
    """Play every order of a family, each in a new scene; a failure says which order it was and how it went."""
    orders = family.orders()
    for order in orders:
        played = _Played(await scene_of())
        try:
            await played.through(order)
        except Exception as error:
            raise AssertionError(_told(order, played.went, error)) from error
    assert len(orders) == family.played or ASKED in os.environ
    print(f"{family.name}: {len(orders)} of {family.possible} orders")  # noqa: T201 a failure shows it


class _Played:
    """One order: whose turns are due, who is in the middle of a step, and how it went."""

    def __init__(self, scene: Scene) -> None:
        self.went: list[str] = []
        self._scene = scene
        self._left = {actor: iter(steps) for actor, steps in scene.steps().items()}
        self._due: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {actor: [] for actor in self._left}
        self._running: dict[str, asyncio.Task[object]] = {}
        self._waiting: set[str] = set()

    async def through(self, order: Order) -> None:
        try:
            for step in order:
                await self._turn(*step.split("."))
            await self._let_end()
            for actor, steps in self._left.items():
                assert next(steps, None) is None, f"{actor} had more steps than turns"
            await self._scene.check()
        finally:
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _turn(self, actor: str, name: str) -> None:
        self._due[actor] += 1
        self._names[actor].append(name)
        moved = await self._go_on(actor)
        # Whoever waits may have been let go, and may let others go.
        while moved and self._running:
            moved = any([await self._go_on(each) for each in list(self._running)])
        if name in _SHOWS:
            await self._scene.watch()

    async def _go_on(self, actor: str) -> bool:
        """Let an actor do what is due until it is done or must wait; return whether a step came to its end."""
        ended = False
        while actor in self._running or self._due[actor]:
            if actor not in self._running:
                self._due[actor] -= 1
                self.went.append(f"{actor}.{self._names[actor].pop(0)}")
                self._running[actor] = asyncio.create_task(next(self._left[actor])())
            if not await self._ended(actor):
                return ended
            self._waiting.discard(actor)
            await self._running.pop(actor)
            ended = True
        return ended

    async def _ended(self, actor: str) -> bool:
        """Whether the actor's step came to its end; False once it is known to wait for somebody."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            done, _ = await asyncio.wait({self._running[actor]}, timeout=_GLANCE)
            if done:
                return True
            if await self._scene.waits(actor):
                if actor not in self._waiting:
                    self._waiting.add(actor)
                    self.went.append(f"({actor} waits)")
                return False
            assert time.monotonic() < deadline, f"{actor} neither ended its step nor waits for anybody"

    async def _let_end(self) -> None:
        """Who still waits has nobody left to free him: then PostgreSQL says that it is a deadlock."""
        deadline = time.monotonic() + _PATIENCE
        while self._running:
            for actor in list(self._running):
                await self._go_on(actor)
            assert time.monotonic() < deadline, f"nobody frees {', '.join(self._running)}"


def _told(order: Order, went: list[str], error: Exception) -> str:
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    return (
        f"{type(error).__name__}: {error}\nin the order\n  {' '.join(order)}\nwhich went\n  {' '.join(went)}\n"
        f"to play it again:\n  {ASKED}='{' '.join(order)}' .venv/bin/python -m pytest '{test}'"
    )
