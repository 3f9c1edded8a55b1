"""Procrastinate: stored functions and a row's status; ten handlers at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import asynccontextmanager
from typing import Any

import procrastinate
from procrastinate.tasks import Task

from benchmarks.peers.base import Body, Lent, Peer, Take

LANE = "sync"
HANDLERS = 10


class Recording:
    def __init__(self, task: Task[Any, Any, Any]) -> None:
        self._task = task

    async def one(self, body: Body) -> None:
        await self._task.defer_async(body=body)

    async def many(self, bodies: Sequence[Body]) -> None:
        await self._task.batch_defer_async(*[{"body": body} for body in bodies])


class Procrastinate(Peer):
    async def prepare(self) -> None:
        app, _ = self._made()
        async with app.open_async():
            await app.schema_manager.apply_schema_async()

    @asynccontextmanager
    async def recording(self) -> Lent:
        app, task = self._made()
        async with app.open_async():
            yield Recording(task)

    async def relay(self, take: Take) -> None:
        app, _ = self._made(take)
        async with app.open_async():
            await app.run_worker_async(queues=[LANE], concurrency=HANDLERS, install_signal_handlers=False)

    def _made(self, take: Take | None = None) -> tuple[procrastinate.App, Task[Any, Any, Any]]:
        connector = procrastinate.PsycopgConnector(conninfo=self.dsn, min_size=2, max_size=20)
        app = procrastinate.App(connector=connector)

        @app.task(name="sync", queue=LANE)
        async def handle(body: Body) -> None:
            assert take is not None
            take(body)

        return app, handle
