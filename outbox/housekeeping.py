"""Housekeeping: what a relay does beside carrying: fold, prune, forget."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from functools import partial

from outbox.primary import PRIMARY_FAILED, Primary, code_of
from outbox.prune import fold, prune_attempts, prune_discarded, prune_events, prune_reconciliations
from outbox.settings import SyncConfig

__all__ = ["Housekeeper"]

_log = logging.getLogger("outbox.relay")

# Of the time that events are kept: what was owed when it was passed by is kept by as much longer.
_BEGIN_ANEW_SHARE = 1 / 6
# What is owed and old may be much: to walk through all of it takes one of so many parts of the time.
_PART = 4
# Of the time between two rounds, at most: relays also carry.
_ROUND_SHARE = 1 / 2
# Of comparisons there are few, and no index of their age.
_COMPARED_EVERY = 60.0


class Housekeeper:
    """Keeps the tables of one relay's primary tidy.

    Pruning goes on where it was. What it passed by is still owed, or was when it was passed: it is looked at again now
    and then, because to begin anew each time is to walk through all of that, and through what was deleted since the
    last vacuum.
    """

    def __init__(self, primary: Primary, config: SyncConfig, backend_ids: Collection[str]) -> None:
        self._primary = primary
        self._config = config
        self._schema = config.database_schema
        self._backend_ids = backend_ids
        self._event = 0
        self._attempts: dict[str, int] = {}
        self._anew_every = _BEGIN_ANEW_SHARE * config.keep_events.total_seconds()
        self._anew_at = time.monotonic() + self._anew_every
        self._until = self._compared_at = self._walked_for = 0.0

    async def keep_tidy(self) -> None:
        """Tidy every `prune_interval`, for ever."""
        while True:
            await asyncio.sleep(self._config.prune_interval.total_seconds())
            await self.tidy()

    async def tidy(self) -> None:
        """Fold finished attempts into the totals, and prune for at most half of `prune_interval`.

        What the primary fails is tried again the next time, and keeps nothing else from being done.
        """
        self._until = time.monotonic() + _ROUND_SHARE * self._config.prune_interval.total_seconds()
        steps: list[Callable[[], Awaitable[None]]] = [partial(self._fold, each) for each in self._backend_ids]
        for step in (*steps, self._prune_attempts, self._prune_notes, self._prune_events):
            try:
                await step()
            except PRIMARY_FAILED as error:
                _log.warning("housekeeping failed (%s)", code_of(error))

    async def _fold(self, backend_id: str) -> None:
        async with self._primary.connection() as connection:
            await fold(connection, self._schema, backend_id)

    async def _prune_attempts(self) -> None:
        more = True
        while more:
            async with self._primary.connection() as connection:
                walked = await prune_attempts(connection, self._schema, self._config.keep_attempts, self._attempts)
            self._attempts |= {backend_id: each.through for backend_id, each in walked.items()}
            more = any(each.more for each in walked.values()) and self._has_time()

    async def _prune_notes(self) -> None:
        async with self._primary.connection() as connection:
            keep = self._config.keep_attempts
            if time.monotonic() >= self._compared_at:
                self._compared_at = time.monotonic() + min(_COMPARED_EVERY, keep.total_seconds())
                await prune_reconciliations(connection, self._schema, keep)
            after = await prune_discarded(connection, self._schema, keep)
        while after is not None and self._has_time():
            async with self._primary.connection() as connection:
                after = await prune_discarded(connection, self._schema, keep, after)

    async def _prune_events(self) -> None:
        started, more = time.monotonic(), True
        while more:
            async with self._primary.connection() as connection:
                walked = await prune_events(connection, self._schema, self._config.keep_events, self._event)
            self._event, more = walked.through, walked.more and self._has_time()
        self._walked_for += time.monotonic() - started
        if not walked.more and time.monotonic() >= self._anew_at:
            self._anew_at = time.monotonic() + max(self._anew_every, _PART * self._walked_for)
            self._event, self._attempts, self._walked_for = 0, {}, 0.0

    def _has_time(self) -> bool:
        return time.monotonic() < self._until
