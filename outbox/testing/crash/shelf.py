"""Shelf: the secondaries of a run, in one process that is never killed and so can tell what really arrived.

Each keeps the newest state of every key, tombstones included, guarded by position as a real one is, and misbehaves
for as long as it is told to.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import msgspec

from outbox.content import content_digest
from outbox.testing.crash.remote import POISON
from outbox.testing.crash.terms import BACKENDS, SPARED, Terms
from outbox.testing.crash.wire import Request, receive, send
from outbox.testing.history import History
from outbox.testing.records import Answered, Applied, Asked, Entry, Key, Refused

__all__ = ["serve"]

_LATEST = 200
_GONE = (ConnectionError, EOFError)


async def serve(terms: Terms) -> None:
    """Answer on the run's socket until this task is cancelled."""
    shelves = {backend_id: _Shelf(backend_id, terms) for backend_id in BACKENDS}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(*_GONE):
            request = msgspec.msgpack.decode(await receive(reader), type=Request)
            await shelves[request.backend_id].answer(request, reader, writer)
        writer.close()

    server = await asyncio.start_unix_server(answer, terms.shelf)
    async with server:
        try:
            await server.serve_forever()
        finally:
            for each in shelves.values():
                each.history.close()


class _Ambush:
    """Somebody waits for the next call to reach a point, and the call waits there for him."""

    def __init__(self, point: str) -> None:
        self.point = point
        self.caught: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.over = asyncio.Event()


class _Shelf:
    """One secondary."""

    def __init__(self, backend_id: str, terms: Terms) -> None:
        options = {"process": f"shelf-{backend_id}", "role": "secondary", "backend_id": backend_id}
        self.history = History(terms.history, **options)
        self._backend_id = backend_id
        self._held: dict[Key, tuple[int, str]] = {}
        self._calls = 0
        self._callers: deque[str] = deque(maxlen=_LATEST)
        self._fault, self._seconds = "", 0.0
        self._healed = asyncio.Event()
        self._ambushes: dict[int, _Ambush] = {}
        self._numbers = itertools.count(1)
        self._answers: dict[str, Callable[[Request], Awaitable[Any]]] = {
            "check": self._check,
            "highest": self._highest,
            "callers": self._called_by,
            "fault": self._misbehave,
            "ambush": self._lie_in_wait,
            "release": self._release,
            "contents": self._contents,
        }

    async def answer(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, or go away without."""
        if self._fault == "down" and request.caller:
            return
        if request.asks != "apply":
            await send(writer, await self._answers[request.asks](request))
            return
        self._calls += 1
        self._callers.append(request.caller)
        call = f"{self._backend_id}-{self._calls}"
        entries = [_entry(*event) for event in request.events]
        told: dict[str, Any] = {"backend_id": self._backend_id, "call": call}
        caller: dict[str, Any] = {"caller": request.caller, "attempt_id": request.attempt_id}
        self.history.write(Asked(entries=entries, **caller, **told))
        answer = await self._take(request, entries, told)
        how = "cut" if answer is None else "raised" if "after" in answer else "answered"
        self.history.write(Answered(how="abandoned" if reader.at_eof() else how, **told))
        if answer is not None:
            await send(writer, answer)

    async def _take(self, request: Request, entries: list[Entry], told: dict[str, Any]) -> dict[str, Any] | None:
        """Take a batch as the fault of the moment has it; None when nobody is to learn of it."""
        fault, seconds = self._fault, self._seconds
        await self._pass("asked", request.caller)
        if fault == "throttled":
            return {"after": seconds}
        if fault == "hung":
            await self._healed.wait()
            return None
        if fault == "late":
            await asyncio.sleep(seconds)
        outcomes = self._apply(request, entries, told, partly=fault == "partly")
        await self._pass("applied", request.caller)
        if fault == "slow":
            await asyncio.sleep(seconds)
        if fault == "mute":
            return None
        return {"outcomes": outcomes[:-1] if fault == "short" else outcomes}

    def _apply(self, request: Request, entries: list[Entry], told: dict[str, Any], *, partly: bool) -> list[str]:
        """Keep what is newer, and tell the history in the same breath."""
        outcomes: list[str] = []
        for number, (event, entry) in enumerate(zip(request.events, entries, strict=True)):
            # Of every four one is blamed, and one is refused and not to blame.
            kept = number % 2 == 0 or not partly
            outcomes.append(self._keep(entry, event[4]) if kept else "retry" if number % 4 == 1 else "refused")
        found: dict[str, list[Entry]] = {}
        for outcome, entry in zip(outcomes, entries, strict=True):
            found.setdefault(outcome, []).append(entry)
        if applied := found.pop("applied", None):
            self.history.write(Applied(entries=applied, **told))
        for why, refused in found.items():
            self.history.write(Refused(positions=[each.position for each in refused], why=why, **told))
        return outcomes

    def _keep(self, entry: Entry, content: str | None) -> str:
        held = self._held.get(entry.key)
        if held is not None and held[0] >= entry.position:
            return "stale"
        if POISON in (content or ""):
            return "rejected"
        self._held[entry.key] = (entry.position, entry.digest)
        return "applied"

    async def _pass(self, point: str, caller: str) -> None:
        for ambush in self._ambushes.values():
            if ambush.point == point and not ambush.caught.done() and not caller.startswith(SPARED):
                ambush.caught.set_result(caller)
                await ambush.over.wait()
                return

    async def _check(self, _: Request) -> Any:
        if self._fault == "hung":
            await self._healed.wait()
        return {"waiting": [ambush.point for ambush in self._ambushes.values()]}

    async def _highest(self, _: Request) -> Any:
        return {"position": max((position for position, _ in self._held.values()), default=0)}

    async def _called_by(self, _: Request) -> Any:
        return list(self._callers)

    async def _misbehave(self, request: Request) -> Any:
        self._healed.set()
        self._healed = asyncio.Event()
        self._fault, self._seconds = request.fault, request.seconds
        return {}

    async def _lie_in_wait(self, request: Request) -> Any:
        """Answer with the caller of the next call that reaches the point, and the number by which it is released."""
        number, ambush = next(self._numbers), _Ambush(request.fault)
        self._ambushes[number] = ambush
        try:
            async with asyncio.timeout(request.seconds):
                return {"caller": await ambush.caught, "number": number}
        except TimeoutError:
            # Mostly nobody came, and the future is cancelled with the wait for it.
            if not ambush.caught.cancelled():
                return {"caller": ambush.caught.result(), "number": number}
            del self._ambushes[number]
            return {"caller": "", "number": 0}

    async def _release(self, request: Request) -> Any:
        if (ambush := self._ambushes.pop(request.number, None)) is not None:
            ambush.over.set()
        return {}

    async def _contents(self, _: Request) -> Any:
        return [(position, *key, digest) for key, (position, digest) in self._held.items() if digest]


def _entry(position: int, tenant_id: str, resource_type: str, resource_id: str, content: str | None) -> Entry:
    digest = "" if content is None else content_digest(content)
    return Entry(position, tenant_id, resource_type, resource_id, digest)
