"""Ours, owing every event to one secondary or to three, each in a loop of its own."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count

import asyncpg
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.peers.base import Body, Lent, Peer, Recorder, Take
from outbox import Applied, Outcome, ResourceDigest, SyncConfig, SyncEvent, SyncManager, record
from outbox.migrate import migrate


class Taking:
    """A secondary that decodes every content, as the peers' handlers are handed theirs decoded."""

    def __init__(self, backend_id: str, take: Take | None = None) -> None:
        self.backend_id = backend_id
        self._take = take

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        assert self._take is not None
        for event in batch:
            self._take(json.loads(event.content or ""))
        return [Applied()] * len(batch)

    async def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> AsyncIterator[ResourceDigest]:
        return
        yield


class Recording:
    def __init__(self, connection: asyncpg.Connection, manager: SyncManager) -> None:
        self._connection = connection
        self._manager = manager
        self._numbers = count()

    async def one(self, body: Body) -> None:
        await self._record(self._event(body))

    async def many(self, bodies: Sequence[Body]) -> None:
        await self._record([self._event(body) for body in bodies])

    async def _record(self, events: SyncEvent | list[SyncEvent]) -> None:
        async with self._connection.transaction():
            await record(self._connection, events)
        self._manager.ring()

    def _event(self, body: Body) -> SyncEvent:
        return SyncEvent.update("Observation", f"{os.getpid()}-{next(self._numbers)}", body, tenant_id="tenant-1")


class Ours(Peer):
    def manager(self, take: Take | None = None) -> SyncManager:
        config = SyncConfig() if self.quick else SyncConfig(batch_size=500)
        secondaries = [Taking(f"secondary-{number}", take) for number in range(self.secondaries)]
        return SyncManager(create_async_engine(self.url), secondaries, config=config)

    async def prepare(self) -> None:
        manager = self.manager()
        await migrate(manager.engine)
        await manager.register()
        await manager.engine.dispose()

    @asynccontextmanager
    async def recording(self) -> Lent:
        connection, manager = await asyncpg.connect(self.dsn), self.manager()
        recorder: Recorder = Recording(connection, manager)
        yield recorder
        await manager.aclose()
        await manager.engine.dispose()
        await connection.close()

    async def relay(self, take: Take) -> None:
        await self.manager(take).relay().run()


class OursThree(Ours):
    secondaries = 3
