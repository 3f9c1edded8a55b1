"""Nemesis: carries a plan out, and tells the history what it did before and after it did it."""

from __future__ import annotations

import asyncio
import itertools
import signal
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar

import asyncpg
from msgspec.structs import replace

from outbox.primary import PRIMARY_FAILED
from outbox.testing.crash.nursery import Nursery
from outbox.testing.crash.plan import STAGES, Strike
from outbox.testing.crash.terms import BACKENDS, SPARED, Terms
from outbox.testing.crash.wire import Request, ask
from outbox.testing.history import History
from outbox.testing.postgres import EmbeddedPostgres
from outbox.testing.proxy import Proxy
from outbox.testing.records import Did, Fired, Healed

__all__ = ["Nemesis", "Population"]

_PATIENCE = 3.0
# Strikes wait for each other: only what is far beyond that would never end.
_LONGEST = 300.0
_STOPS_WITHIN = 60.0
_BETWEEN_LOOKS = 0.02


class Population:
    """Keeps as many of each alive as the terms say, whoever dies."""

    def __init__(self, terms: Terms, nursery: Nursery) -> None:
        self._wanted = {"relay": terms.relays, "writer": terms.writers, "prover": 1, SPARED: terms.survivors}
        self._nursery = nursery
        self._numbers = itertools.count(1)
        self._keeping: set[asyncio.Task[None]] = set()

    def keep(self, role: str) -> None:
        """Start the processes of a role, and start another whenever one ends."""
        for _ in range(self._wanted[role]):
            keeping = asyncio.create_task(self._keep_one(role), name=role)
            self._keeping.add(keeping)

    async def stop(self, role: str) -> None:
        """Stop the processes of a role in order, and start no more."""
        keeping = {each for each in self._keeping if each.get_name() == role}
        for each in keeping:
            each.cancel()
        await asyncio.gather(*keeping, return_exceptions=True)
        self._keeping -= keeping
        await self._nursery.stop(self._nursery.living(role), _STOPS_WITHIN)

    async def _keep_one(self, role: str) -> None:
        while True:
            name = f"{role}-{next(self._numbers)}"
            self._nursery.start(role, name)
            if await self._nursery.end(name) not in (0, -signal.SIGKILL):
                # What does not even start must not be tried in a spin.
                await asyncio.sleep(1)


class Nemesis:
    """Strikes as planned. Each strike runs beside the others, except that the primary is away once at a time."""

    def __init__(
        self, terms: Terms, nursery: Nursery, server: EmbeddedPostgres, proxy: Proxy, history: History
    ) -> None:
        self._terms = terms
        self._nursery = nursery
        self._server = server
        self._proxy = proxy
        self._history = history
        self._primary = asyncio.Lock()
        self._killing = asyncio.Lock()
        self._until = 0.0
        self._shelves: dict[str, asyncio.Lock] = {}
        self._hurt: set[str] = set()
        self.stuck: list[str] = []
        """The strikes that did not end by themselves."""

    async def carry_out(self, strikes: list[Strike], seconds: float) -> None:
        """Return when every strike is over and healed, and so many seconds are over."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._until = began + seconds
        async with asyncio.TaskGroup() as group:
            for strike in strikes:
                await asyncio.sleep(began + strike.at - loop.time())
                group.create_task(self._strike(strike))
            await asyncio.sleep(self._until - loop.time())

    async def _strike(self, strike: Strike) -> None:
        limit = asyncio.timeout(_LONGEST)
        try:
            async with limit:
                await self.WAYS[strike.fault](self, strike)
        except TimeoutError as error:
            if not limit.expired():
                raise
            self.stuck.append(strike.name)
            traceback.print_exception(error)

    async def _kill(self, strike: Strike) -> None:
        """Kill a relay, but not before one got as far as a call: else a slow machine would see nothing done."""
        async with self._killing:
            if asyncio.get_running_loop().time() < self._until:
                await self._somebody_at_work()
        if asyncio.get_running_loop().time() > self._until:
            return
        async with self._struck(strike) as name:
            self._nursery.signal(name, signal.SIGKILL)
            await self._nursery.end(name)

    async def _somebody_at_work(self) -> None:
        for _ in range(int(_PATIENCE / _BETWEEN_LOOKS)):
            if await self._at_work():
                return
            await asyncio.sleep(_BETWEEN_LOOKS)

    async def _at_work(self) -> list[str]:
        """Return the relays that live, are whole and got as far as a call of a secondary."""
        asked = [ask(self._terms.shelf, Request(asks="callers", backend_id=backend_id)) for backend_id in BACKENDS]
        callers = set().union(*await asyncio.gather(*asked))
        return [name for name in self._whole() if name in callers]

    def _whole(self) -> list[str]:
        return [name for name in self._nursery.living("relay") if name not in self._hurt]

    async def _stop(self, strike: Strike) -> None:
        """Stop a process for longer than its lease, and let it go on as if nothing had happened."""
        async with self._struck(strike) as name:
            self._nursery.signal(name, signal.SIGSTOP)
        await asyncio.sleep(strike.seconds)
        if self._nursery.lives(name):
            self._history.write(Did(operation="resumed"))
        self._nursery.signal(name, signal.SIGCONT)
        self._hurt.discard(name)
        self._heal(strike, name)

    @asynccontextmanager
    async def _struck(self, strike: Strike) -> AsyncIterator[str]:
        """Whom a strike hits: who reaches its point, and is held there meanwhile; if nobody does, anybody."""
        async with self._caught(strike) as name:
            if name and name not in self._hurt:
                self._hit(strike, name)
                yield name
                return
        name = await self._anybody(strike)
        self._hit(replace(strike, how="anywhere"), name)
        yield name

    @asynccontextmanager
    async def _caught(self, strike: Strike) -> AsyncIterator[str]:
        """Who reaches the point of a strike; nobody where it has none, or when nobody does in time."""
        if strike.how == "anywhere":
            yield ""
        elif strike.how in STAGES:
            link = await self._proxy.catch(strike.stage, strike.when, _PATIENCE, SPARED)
            yield link.name if link else ""
            if link:
                link.cut()
        else:
            about: dict[str, Any] = {"backend_id": strike.backend_id, "fault": strike.how}
            caught = await ask(self._terms.shelf, Request(asks="ambush", seconds=_PATIENCE, **about))
            yield caught["caller"]
            await ask(self._terms.shelf, Request(asks="release", number=caught["number"], **about))

    async def _anybody(self, strike: Strike) -> str:
        """Return somebody at work, as who has nothing in hand has nothing to lose; else whoever lives."""
        while True:
            if names := await self._at_work() or self._whole():
                return names[strike.number % len(names)]
            await asyncio.sleep(_BETWEEN_LOOKS)

    def _hit(self, strike: Strike, name: str) -> None:
        # Nobody is killed twice, and who is stopped is to wake up again.
        self._hurt.add(name)
        self._fire(strike, name)

    async def _kill_writer(self, strike: Strike) -> None:
        if names := self._nursery.living("writer"):
            name = names[strike.number % len(names)]
            self._fire(strike, name)
            self._nursery.signal(name, signal.SIGKILL)

    async def _crash(self, strike: Strike) -> None:
        async with self._primary:
            self._fire(strike)
            await asyncio.to_thread(self._server.crash)
            await asyncio.to_thread(self._server.start)
            self._heal(strike)

    async def _terminate(self, strike: Strike) -> None:
        """End some sessions of relays and writers, as an administrator would."""
        with suppress(*PRIMARY_FAILED):
            connection = await asyncpg.connect(self._server.dsn(driver="postgresql"), timeout=5)
            try:
                pids = await connection.fetch(
                    "select pid from pg_stat_activity where client_port > 0 and pid <> pg_backend_pid() order by pid"
                )
                self._fire(strike)
                for row in pids[strike.number % 3 :: 3]:
                    await connection.execute("select pg_terminate_backend($1)", row["pid"])
            finally:
                connection.terminate()

    async def _misbehave(self, strike: Strike) -> None:
        async with self._shelves.setdefault(strike.backend_id, asyncio.Lock()):
            about: dict[str, Any] = {"asks": "fault", "backend_id": strike.backend_id}
            self._fire(strike, strike.backend_id)
            waits = strike.seconds if strike.how in ("late", "slow") else 0.1
            await ask(self._terms.shelf, Request(fault=strike.how, seconds=waits, **about))
            await asyncio.sleep(strike.seconds)
            await ask(self._terms.shelf, Request(**about))
            self._heal(strike, strike.backend_id)

    async def _cut(self, strike: Strike) -> None:
        """Fail connections to the primary: one at a stage, or a third of all in one of the ways networks have."""
        if strike.how in STAGES or strike.how in ("before commit", "swallowed"):
            if link := await self._proxy.catch(strike.stage, strike.when, _PATIENCE):
                self._fire(strike, link.name)
                await asyncio.sleep(strike.seconds if strike.how == "swallowed" else 0)
                link.cut()
                self._heal(strike, link.name)
            return
        links = sorted(self._proxy.links, key=lambda link: link.name)[strike.number % 3 :: 3]
        self._fire(strike)
        for link in links:
            # Another strike may have a hole in it already.
            link.hole, link.slow = link.hole or strike.how == "hole", link.slow or strike.how == "slow"
        await asyncio.sleep(0 if strike.how == "reset" else strike.seconds)
        for link in links:
            # What was swallowed is missing in the stream for ever.
            link.slow = False
            if strike.how != "slow":
                link.cut()
        self._heal(strike)

    def _fire(self, strike: Strike, against: str = "") -> None:
        self._history.write(Fired(fault=strike.name, against=against))

    def _heal(self, strike: Strike, against: str = "") -> None:
        self._history.write(Healed(fault=strike.name, against=against))

    WAYS: ClassVar[dict[str, Callable[[Nemesis, Strike], Awaitable[None]]]] = {
        "kill": _kill,
        "stop": _stop,
        "writer": _kill_writer,
        "postgres": _crash,
        "terminate": _terminate,
        "cut": _cut,
        "secondary": _misbehave,
    }
    """By fault, how it is done."""
