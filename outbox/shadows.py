"""Shadows: which secondaries are not relied on yet, so that nobody waits for them unless he names them."""

from __future__ import annotations

import asyncio
import logging
import time

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.primary import PRIMARY_FAILED, code_of
from outbox.statement import Statement

__all__ = ["READABLE", "SHADOWS", "Shadows"]

_log = logging.getLogger("outbox.wait")

SHADOWS = Statement("""
select backend_id from {schema}.outbox_secondary where status = 'shadow'
""")

# What is owed nothing misses what is written, however short its lag.
READABLE = Statement("""
select exists (
    select from {schema}.outbox_secondary where backend_id = :backend_id and status in ('live', 'paused')
)
""")

_GOOD_FOR = 1.0
_PATIENCE = 0.25


class Shadows:
    """The shadows of one registry, asked about once a second at most by everybody of this process together."""

    def __init__(self, engine: AsyncEngine, schema: str) -> None:
        self._engine = engine
        self._schema = schema
        self._names: frozenset[str] = frozenset()
        self._good_until = 0.0
        self._asking: asyncio.Task[None] | None = None

    async def names(self) -> frozenset[str]:
        """Return their names as of a second ago or less; as last known when the primary does not answer at once."""
        if time.monotonic() >= self._good_until:
            # Not cancelled when it is late: to close a connection to a server that hangs may hang too.
            await asyncio.wait({self._question()}, timeout=_PATIENCE)
        return self._names

    async def readable(self, backend_id: str) -> bool:
        """Whether a secondary is as far as its lag says: neither a shadow nor one that is draining or removed."""
        async with self._engine.connect() as connection:
            return bool(await connection.scalar(text(READABLE.on(self._schema)), {"backend_id": backend_id}))

    def _question(self) -> asyncio.Task[None]:
        asking, loop = self._asking, asyncio.get_running_loop()
        if asking is None or asking.done() or asking.get_loop() is not loop:
            asking = self._asking = loop.create_task(self._ask())
        return asking

    async def _ask(self) -> None:
        try:
            async with self._engine.connect() as connection:
                self._names = frozenset(await connection.scalars(text(SHADOWS.on(self._schema))))
        except PRIMARY_FAILED as error:
            _log.warning("asking which secondaries are shadows failed (%s)", code_of(error))
        self._good_until = time.monotonic() + _GOOD_FOR
