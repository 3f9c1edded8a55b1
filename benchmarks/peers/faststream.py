"""faststream-outbox: rows leased by an update, deleted in batches; fetches of 100, deletes of 100."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import asynccontextmanager
from typing import Any

from faststream_outbox import OutboxBroker, make_outbox_table
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from benchmarks.peers.base import Body, Lent, Peer, Take

LANE = "sync"
BATCH = 100


class Recording:
    def __init__(self, engine: AsyncEngine, broker: OutboxBroker) -> None:
        self._engine = engine
        self._broker = broker

    async def one(self, body: Body) -> None:
        async with self._engine.begin() as connection:
            await self._broker.publish(body, queue=LANE, session=connection)

    async def many(self, bodies: Sequence[Body]) -> None:
        async with self._engine.begin() as connection:
            await self._broker.publish_batch(*bodies, queue=LANE, session=connection)


class FastStream(Peer):
    def __init__(self, dsn: str, *, quick: bool) -> None:
        super().__init__(dsn, quick=quick)
        self._metadata = MetaData()
        self._table = make_outbox_table(self._metadata, table_name="faststream_outbox")

    async def prepare(self) -> None:
        engine = create_async_engine(self.url)
        async with engine.begin() as connection:
            await connection.run_sync(self._metadata.create_all)
        await engine.dispose()

    @asynccontextmanager
    async def recording(self) -> Lent:
        engine, broker = self._opened()
        yield Recording(engine, broker)
        await engine.dispose()

    async def relay(self, take: Take) -> None:
        _, broker = self._opened()
        settings: dict[str, Any] = {"max_workers": 1, "fetch_batch_size": BATCH, "terminal_flush_batch_size": BATCH}

        @broker.subscriber(LANE, min_fetch_interval=0.05, max_fetch_interval=1.0, **settings)
        async def handle(body: dict[str, Any]) -> None:
            take(body)

        await broker.start()
        await asyncio.Event().wait()

    def _opened(self) -> tuple[AsyncEngine, OutboxBroker]:
        engine = create_async_engine(self.url, pool_size=20)
        return engine, OutboxBroker(engine, outbox_table=self._table)
