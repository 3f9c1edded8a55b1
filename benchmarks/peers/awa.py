"""awa-pg: a core in Rust on append-only segments; bulks by COPY, 1,024 handlers at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import awa

from benchmarks.peers.base import Body, Lent, Peer, Take

LANE = "sync"
HANDLERS = 1_024
CONNECTIONS = 20


@dataclass
class SyncBody:
    body: dict[str, Any]


class Recording:
    def __init__(self, client: awa.AsyncClient) -> None:
        self._client = client

    async def one(self, body: Body) -> None:
        await self._client.insert(SyncBody(body), queue=LANE)

    async def many(self, bodies: Sequence[Body]) -> None:
        await self._client.enqueue_many_copy([SyncBody(body) for body in bodies], queue=LANE)


class Awa(Peer):
    async def prepare(self) -> None:
        client = self._client()
        await client.migrate()
        await client.install_queue_storage(reset=True)
        await client.close()

    @asynccontextmanager
    async def recording(self) -> Lent:
        client = self._client()
        yield Recording(client)
        await client.close()

    async def relay(self, take: Take) -> None:
        client = self._client()

        @client.task(SyncBody, queue=LANE)
        async def handle(given: Any) -> None:
            take(given.args.body)

        await client.start([(LANE, HANDLERS)])
        await asyncio.Event().wait()

    def _client(self) -> awa.AsyncClient:
        return awa.AsyncClient(self.dsn, max_connections=CONNECTIONS)
