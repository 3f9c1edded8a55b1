"""Floors: where a relay's claims begin in each lane, when to forget it, and whether there is anything to claim."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from outbox.lanes import HIGHEST, Lanes, advance_floors
from outbox.primary import PRIMARY_FAILED, Primary
from outbox.settings import SyncConfig

if TYPE_CHECKING:
    import asyncpg

__all__ = ["Floors"]

_LOOK_EVERYWHERE_EVERY = 60.0
_RAISE_EVERY = 0.25


class Floors:
    """Raises the floors of one secondary's lanes for one relay, and forgets them when they may be wrong."""

    def __init__(self, primary: Primary, config: SyncConfig, backend_id: str) -> None:
        self.lanes = Lanes()
        self._primary = primary
        self._config = config
        self._backend_id = backend_id
        # What was quiet when a claim found nothing, nothing held and nothing in hand; None when it did not.
        self.rested_through: int | None = None
        self._connected = 0
        self._slowest = 0.0
        self._raised_at = 0.0
        self._behind = True
        self._look_everywhere_at = time.monotonic() + _LOOK_EVERYWHERE_EVERY

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection[Any]]:
        """Lend a connection to whoever goes by the floors."""
        async with self._primary.connection() as connection:
            if self._connected != self._primary.connected:
                # A primary that crashed meanwhile gives positions again that were drawn and never committed.
                self._connected = self._primary.connected
                self.lanes.look_everywhere()
            started = time.monotonic()
            try:
                yield connection
            finally:
                self._slowest = max(self._slowest, time.monotonic() - started)

    async def at_rest(self) -> bool:
        """Whether no position was drawn since a claim found nothing at all: another would find nothing either.

        Takes no turn and writes nothing, where a claim writes a lock and commits it.
        """
        if self.rested_through is None:
            return False
        async with self.connection() as connection:
            highest = await connection.fetchval(HIGHEST.on(self._config.database_schema))
        return bool(highest == self.lanes.quiet == self.rested_through)

    async def mind(self, *, busy: bool) -> None:
        """Between two claims keep the next ones short: what was delivered is soon more than what is claimed."""
        now = time.monotonic()
        if now >= self._look_everywhere_at:
            self.lanes.look_everywhere()
            # Under an old snapshot the claims that follow walk through all that was deleted: under 1 % of the time.
            self._look_everywhere_at = now + max(_LOOK_EVERYWHERE_EVERY, 100 * self._slowest)
            self._slowest = 0.0
        self._behind = self._behind or busy
        every = _RAISE_EVERY if self._behind else self._config.prune_interval.total_seconds()
        if now - self._raised_at < every:
            return
        self._raised_at = now
        with suppress(*PRIMARY_FAILED):
            async with self.connection() as connection:
                await advance_floors(connection, self._config.database_schema, self._backend_id, self.lanes)
            # Once work ends they are raised once more, so that it is known soon that there is none.
            self._behind = busy or self.lanes.mark is not None
