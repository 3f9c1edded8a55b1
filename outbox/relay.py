"""Relay: one process that carries what is owed to its secondaries, each in a loop of its own."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.carrier import Carrier
from outbox.errors import UnknownSecondary
from outbox.health import Roll
from outbox.housekeeping import Housekeeper
from outbox.primary import PRIMARY_FAILED, Primary, code_of
from outbox.proof import Proof
from outbox.register import Registration, register_known
from outbox.retry import RetryPolicy
from outbox.settings import SyncConfig
from outbox.wakeup import Doorbell
from outbox.watch import Watch

__all__ = ["Relay"]

_log = logging.getLogger("outbox.relay")

_LAST_CLAIM = 5.0
_BETWEEN_TRIES = 0.1


class Relay:
    """Claims, dispatches and settles for its secondaries until it is stopped. Any number may run beside each other.

    `run` is for a process, `run_once` and `drain` are for scripts and tests. Made by `SyncManager.relay()`.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        registrations: Sequence[Registration],
        config: SyncConfig,
        policy: RetryPolicy,
        doorbell: Doorbell,
        roll: Roll | None = None,
        proof: Proof | None = None,
    ) -> None:
        # Random for every start of a process: a host name that comes back must not inherit leases.
        self.relay_id = uuid4()
        self._engine = engine
        self._registrations = registrations
        self._config = config
        self._roll = roll or Roll()
        self._proof = proof
        self._primary = Primary(engine, config)
        self._carriers = {
            each.backend_id: Carrier(each, self._primary, config, policy, self.relay_id) for each in registrations
        }
        self._watch = Watch(self._primary, config, self.relay_id, list(self._carriers.values()), doorbell)
        self._housekeeper = Housekeeper(self._primary, config, list(self._carriers))
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        # Whether hands that were lent are being taken back.
        self.closing = False
        self._users = 0
        self._seizing: set[asyncio.Task[int]] = set()
        self._background: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Carry until `stop` is called or this task is cancelled; then finish or hand back what is in hand.

        Raises `RuntimeError` when a run of this relay was cancelled or failed before: go on with another relay.
        """
        with self._roll.answering():
            await self._run()

    async def _run(self) -> None:
        stopping = asyncio.create_task(self._stop.wait())
        opening = asyncio.create_task(self._open())
        loops: list[asyncio.Task[None]] = []
        beside: list[asyncio.Task[None]] = []
        try:
            # A primary that never answers must not keep a relay from being stopped.
            await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if opening.done():
                opening.result()
                loops = [asyncio.create_task(carrier.run()) for carrier in self._carriers.values()]
                beside = [asyncio.create_task(each) for each in self._beside()]
                ends: set[asyncio.Task[Any]] = {*loops, *beside, stopping}
                done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                for ended in done:
                    ended.result()
                if not self._stop.is_set():
                    raise RuntimeError("a run of this relay was cut off, which ended all of its runs: make another")
        finally:
            await _cancelled([opening, stopping, *beside])
            await self._wind_down(loops)
            await self._close()

    async def run_once(self, backend_id: str) -> int:
        """Carry one batch to one secondary; return how many deliveries it held, 0 when nothing was due."""
        if backend_id not in self._carriers:
            raise UnknownSecondary(backend_id, f"this relay has {', '.join(sorted(self._carriers)) or 'none'}")
        async with self._opened():
            return await self._carriers[backend_id].run_once()

    async def drain(self) -> int:
        """Carry until nothing is due at any secondary; return how many deliveries that was.

        What waits for its next attempt, or for a breaker, is not due.
        """
        async with self._opened():
            counts = await asyncio.gather(*(self._drain(carrier) for carrier in self._carriers.values()))
        return sum(counts)

    async def tidy(self) -> None:
        """Fold and prune once, as `run` does every `prune_interval`: for a relay that only drains now and then."""
        async with self._opened():
            await self._housekeeper.tidy()

    @asynccontextmanager
    async def lending_hands(self) -> AsyncIterator[None]:
        """Be ready to `seize` without claiming anything else; at the end what is in hand is finished or handed back."""
        async with self._opened():
            try:
                yield
            finally:
                self.closing = True
                for carrier in self._carriers.values():
                    carrier.stop()
                grace = self._config.shutdown_grace.total_seconds()
                await asyncio.gather(*(carrier.hands.finish(grace) for carrier in self._carriers.values()))
                # A claim under way ends with an attempt that is handed back.
                if self._seizing:
                    await asyncio.wait(self._seizing, timeout=_LAST_CLAIM)

    async def seize(self, backend_id: str, positions: Sequence[int], within: timedelta) -> int:
        """Carry these events to one secondary, if they wait there; return how many were in hand."""
        until = time.monotonic() + within.total_seconds()
        seizing = asyncio.create_task(self._carriers[backend_id].seize(positions, until))
        self._seizing.add(seizing)
        seizing.add_done_callback(self._seizing.discard)
        # Whoever stops waiting must not take a claim with him.
        return await asyncio.shield(seizing)

    def stop(self, *, at_once: bool = False) -> None:
        """Ask `run` to end: finish what is in hand within the grace period, or hand it back `at_once`."""
        self._stop.set()
        if at_once:
            self._hurry.set()

    def stop_on_signals(self) -> None:
        """Stop on SIGTERM and SIGINT; the second signal hurries. Call from inside the running loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: self.stop(at_once=self._stop.is_set()))

    async def _drain(self, carrier: Carrier) -> int:
        total = 0
        while carried := await carrier.run_once():
            total += carried
        return total

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[None]:
        try:
            await self._open()
            yield
        finally:
            await self._close()

    async def _open(self) -> None:
        """Connections, heartbeats and the ear at the door, shared by all who are inside."""
        self._users += 1
        if self._users == 1:
            await self._primary.open()
            await self._register()
            self._background = [asyncio.create_task(self._watch.run())]

    async def _close(self) -> None:
        self._users -= 1
        if self._users == 0:
            try:
                # Whoever was cut off right after a claim may leave something in hand.
                await asyncio.gather(*(carrier.hands.finish(0) for carrier in self._carriers.values()))
            finally:
                await _cancelled(self._background)
                await self._primary.close()

    async def _register(self) -> None:
        """Write the registry, however often the primary goes away before it is written."""
        while True:
            await self._primary.wait()
            try:
                async with self._engine.begin() as connection:
                    await connection.run_sync(register_known, self._config.database_schema, self._registrations)
            except ProgrammingError:
                # Tables or rights that are missing do not come by waiting.
                raise
            except PRIMARY_FAILED as error:
                _log.warning("registering failed (%s)", code_of(error))
                await asyncio.sleep(_BETWEEN_TRIES)
            else:
                return

    async def _wind_down(self, loops: list[asyncio.Task[None]]) -> None:
        for carrier in self._carriers.values():
            carrier.stop()
        if loops:
            # A claim under way is let finish: cut off at its commit, it could leave an attempt that nobody has.
            await asyncio.wait(loops, timeout=_LAST_CLAIM)
        grace = self._config.shutdown_grace.total_seconds() if self._stop.is_set() else 0.0
        finishing = asyncio.gather(*(carrier.hands.finish(grace) for carrier in self._carriers.values()))
        hurry = asyncio.create_task(self._hurry.wait())
        ends: set[asyncio.Future[Any]] = {hurry, finishing}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for carrier in self._carriers.values():
            carrier.hands.give_up(carrier.hands.attempt_ids)
        await finishing
        await _cancelled([*loops, hurry])

    def _beside(self) -> list[Coroutine[Any, Any, None]]:
        """What goes on beside the carrying, for as long as that goes on."""
        tidying = self._housekeeper.keep_tidy()
        return [tidying] if self._proof is None else [tidying, self._proof.run()]


async def _cancelled(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel, and wait a moment: behind a network that swallows everything only closing the pool ends a transaction."""
    for task in tasks:
        task.cancel()
    ending = asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.wait({ending}, timeout=_LAST_CLAIM)
