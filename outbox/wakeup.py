"""Wake-up: a hint that there is something to claim. Polling is the truth; a lost hint costs one poll interval.

The hint is rung after commit and outside the transaction: a NOTIFY inside it would take a lock at commit that all
writers of the cluster share. It is coalesced, so writers cannot flood anybody.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.schema import LISTEN_CHANNEL

__all__ = ["Doorbell"]

_log = logging.getLogger("outbox.wakeup")

_QUIET = 0.005
# While it had nothing to ring it earns rings that no pause follows: whoever commits now and then is heard at once.
_EARNED_PER_RING, _MOST_EARNED = 0.004, 25.0
# So many commits in one pause, and relays have work all the time: they need no more waking, and ringing costs writers.
_MANY, _LONGER_QUIET = 8, 0.02
_NOTIFY = text("select pg_notify(:channel, :schema)")


class Doorbell:
    """Rings the relays of this process at once, and those of other processes at most every 5 ms while it is busy.

    After a while of nothing, up to 25 times in a row without a pause; while this process commits more than 1,600 times
    per second, every 20 ms.
    """

    def __init__(self, schema: str, *, across_processes: bool) -> None:
        self._schema = schema
        self._across = across_processes
        self._listeners: set[Callable[[], None]] = set()
        self._ringing: asyncio.Task[None] | None = None
        self._again = False
        self._announced = 0
        self._pause = _QUIET
        self._earned = _MOST_EARNED
        self._idle_since = time.monotonic()
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener`, from any thread, whenever the bell rings in this process; return how to stop that."""
        self._listeners.add(listener)
        return lambda: self._listeners.discard(listener)

    def ring(self, engine: AsyncEngine | Engine) -> None:
        """Announce a commit. Never blocks, never fails: a hint that cannot be sent is logged and forgotten."""
        for listener in tuple(self._listeners):
            listener()
        if not self._across:
            return
        self._announced += 1
        if isinstance(engine, AsyncEngine):
            self._ring_in_loop(engine)
        else:
            self._ring_in_thread(engine)

    def _ring_in_loop(self, engine: AsyncEngine) -> None:
        self._again = True
        if self._ringing is None or self._ringing.done():
            ringing = self._keep_ringing(engine)
            self._ringing = asyncio.get_running_loop().create_task(ringing, name="outbox-doorbell")

    async def aclose(self) -> None:
        """Return when what was rung is sent; cut off in the middle, it would leave its connection to the collector."""
        if self._ringing is not None and self._ringing.get_loop() is asyncio.get_running_loop():
            await asyncio.wait([self._ringing])

    async def _keep_ringing(self, engine: AsyncEngine) -> None:
        self._earn()
        while self._again:
            self._again = False
            await self._notify(engine)
            await asyncio.sleep(self._quiet())
        self._idle_since = time.monotonic()

    async def _notify(self, engine: AsyncEngine) -> None:
        try:
            async with engine.connect() as connection:
                autocommit = await connection.execution_options(isolation_level="AUTOCOMMIT")
                await autocommit.execute(_NOTIFY, self._parameters())
        except (SQLAlchemyError, OSError) as error:
            _log.warning("doorbell not rung (%s); relays will find the events by polling", type(error).__name__)

    def _ring_in_thread(self, engine: Engine) -> None:
        self._wanted.set()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(
                target=self._keep_ringing_in_thread, args=(engine,), name="outbox-doorbell", daemon=True
            )
            self._thread.start()

    def _keep_ringing_in_thread(self, engine: Engine) -> None:
        # Ends when nobody has written for a second, so that an idle process keeps no thread.
        while self._wanted.wait(timeout=1.0):
            self._wanted.clear()
            self._earn()
            with suppress(SQLAlchemyError, OSError), engine.connect() as connection:
                connection.execution_options(isolation_level="AUTOCOMMIT").execute(_NOTIFY, self._parameters())
            time.sleep(self._quiet())
            self._idle_since = time.monotonic()

    def _earn(self) -> None:
        idle = time.monotonic() - self._idle_since
        self._earned = min(self._earned + idle / _EARNED_PER_RING, _MOST_EARNED)

    def _quiet(self) -> float:
        """How long to keep still now: not at all if that was earned, else by how many commits the last pause had."""
        announced, self._announced = self._announced, 0
        if self._earned >= 1:
            self._earned -= 1
            return 0.0
        self._pause = _LONGER_QUIET if announced * _QUIET > _MANY * self._pause else _QUIET
        return self._pause

    def _parameters(self) -> dict[str, Any]:
        return {"channel": LISTEN_CHANNEL, "schema": self._schema}
