"""PgQueuer: rows leased by an update, deleted into a log; one manager, batches of 500 (of 10 for latency)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import asynccontextmanager

import asyncpg
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.qm import QueueManager
from pgqueuer.queries import Queries

from benchmarks.peers.base import Body, Lent, Peer, Take

ENTRYPOINT = "sync"


class Recording:
    def __init__(self, queries: Queries) -> None:
        self._queries = queries

    async def one(self, body: Body) -> None:
        await self._queries.enqueue(ENTRYPOINT, json.dumps(body).encode())

    async def many(self, bodies: Sequence[Body]) -> None:
        payloads = [json.dumps(body).encode() for body in bodies]
        await self._queries.enqueue([ENTRYPOINT] * len(bodies), payloads, [0] * len(bodies))


class PgQueuer(Peer):
    async def prepare(self) -> None:
        connection = await asyncpg.connect(self.dsn)
        queries = Queries(AsyncpgDriver(connection))
        await queries.install()
        await queries.optimize_autovacuum()
        await connection.close()

    @asynccontextmanager
    async def recording(self) -> Lent:
        connection = await asyncpg.connect(self.dsn)
        yield Recording(Queries(AsyncpgDriver(connection)))
        await connection.close()

    async def relay(self, take: Take) -> None:
        manager = QueueManager(Queries(AsyncpgDriver(await asyncpg.connect(self.dsn))))

        @manager.entrypoint(ENTRYPOINT)
        async def handle(given: Job) -> None:
            take(json.loads(given.payload or b""))

        await manager.run(batch_size=10 if self.quick else 500)
