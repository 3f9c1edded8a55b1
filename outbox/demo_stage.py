"""The demo's stage: real servers as children of this process, a primary, three secondaries, and a relay at work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any

from sqlalchemy.ext.asyncio import create_async_engine

from outbox.errors import OutboxError
from outbox.manager import SyncManager
from outbox.register import Registration
from outbox.relay import Relay
from outbox.secondaries.opensearch import OpenSearchSecondary
from outbox.secondaries.sql import SqlSecondary
from outbox.secondaries.valkey import ValkeySecondary
from outbox.settings import SyncConfig
from outbox.status import BackendSyncStatus
from outbox.testing.postgres import EmbeddedPostgres
from outbox.testing.process import ChildServer
from outbox.testing.servers import OpenSearchServer, ValkeyServer

__all__ = ["CACHE", "REPORTING", "SEARCH", "DemoFailed", "Stage", "Statuses", "open_stage"]

SEARCH, CACHE, REPORTING = "search", "cache", "reporting"

Statuses = Mapping[str, BackendSyncStatus]

# A minute is short: breakers look again sooner than they would in production. All else is as anybody has it.
_CONFIG = SyncConfig(
    breaker_initial=timedelta(milliseconds=300),
    breaker_max=timedelta(seconds=1),
    prune_interval=timedelta(seconds=1),
    shutdown_grace=timedelta(seconds=3),
)
_DATABASES = ("create database clinic", "create database reporting")
_LOOK_EVERY = 0.1


class DemoFailed(OutboxError):
    """The demo did not show what it promises to show."""


class Stage:
    """The servers and everything that talks to them. Made by `open_stage`."""

    def __init__(
        self, postgres: EmbeddedPostgres, index: OpenSearchServer, valkey: ValkeyServer, threads: ThreadPoolExecutor
    ) -> None:
        self.postgres = postgres
        self.index = index
        self.valkey = valkey
        self.engine = create_async_engine(postgres.dsn("clinic"))
        self.search = OpenSearchSecondary(SEARCH, index.url)
        self.cache = ValkeySecondary(CACHE, valkey.url)
        self.reporting = SqlSecondary(REPORTING, postgres.dsn("reporting"))
        self.manager = SyncManager(
            self.engine,
            [self.search, Registration(self.cache, role="cache"), Registration(self.reporting, role="archive")],
            config=_CONFIG,
        )
        self.on_look: Callable[[Statuses], None] = lambda _: None
        self._threads = threads
        self._running: list[asyncio.Task[None]] = []
        self._looked_at = 0.0
        self._relay: Relay | None = None

    def start_relay(self) -> None:
        """Have a relay carry until the end, beside whatever happens on the stage."""
        self._relay = self.manager.relay()
        self.run(self._relay.run())
        self.run(self._watch())

    def run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something beside the acts; should it fail, the act that waits next fails with it."""
        task = asyncio.create_task(work)
        self._running.append(task)
        return task

    async def aside(self, blocking: Callable[[], Any]) -> None:
        """Run a call that blocks, such as starting a server, while everything else goes on."""
        await asyncio.get_running_loop().run_in_executor(self._threads, blocking)

    async def look(self) -> Statuses:
        """Return how every secondary stands, and show it."""
        for task in self._running:
            if task.done() and not task.cancelled():
                task.result()
        found = {each.backend_id: each for each in await self.manager.all_statuses()}
        self._looked_at = time.monotonic()
        self.on_look(found)
        return found

    async def until(self, holds: Callable[[Statuses], bool], promise: str, within: float = 60.0) -> Statuses:
        """Look until `holds` and return what was seen. Raises `DemoFailed` with the promise after `within` seconds."""
        deadline = time.monotonic() + within
        while not holds(seen := await self.look()):
            if time.monotonic() > deadline:
                raise DemoFailed(f"{promise}: not within {within:g} s")
            await asyncio.sleep(_LOOK_EVERY)
        return seen

    async def drained(self) -> Statuses:
        """Return once nothing is owed to anybody."""
        return await self.until(lambda seen: not any(each.pending for each in seen.values()), "everything is delivered")

    async def close(self) -> None:
        """End what runs beside the acts, the relay in good order, then the connections."""
        if self._relay is not None:
            self._relay.stop()
            await asyncio.wait(self._running[:1], timeout=_CONFIG.shutdown_grace.total_seconds() + 2)
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self.manager.aclose()
        await self.engine.dispose()

    async def _watch(self) -> None:
        """Keep looking, so that there is something to see while an act is busy."""
        while True:
            if time.monotonic() - self._looked_at > _LOOK_EVERY:
                await self.look()
            await asyncio.sleep(2 * _LOOK_EVERY)


@asynccontextmanager
async def open_stage() -> AsyncIterator[Stage]:
    """Start the servers, all at once, and yield a stage on them; at the end, nothing of them is left.

    Raises `ServerMissing`, `ServerFailed`.
    """
    postgres, index, valkey = EmbeddedPostgres(), OpenSearchServer(), ValkeyServer()
    with _closed_at_the_end(postgres, index, valkey) as pool:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(pool, each.start) for each in (postgres, index, valkey)))
        await _create_databases(postgres)
        stage = Stage(postgres, index, valkey, pool)
        try:
            yield stage
        finally:
            await stage.close()


@contextmanager
def _closed_at_the_end(*servers: ChildServer) -> Iterator[ThreadPoolExecutor]:
    """Yield the threads in which servers are started.

    Closing is plain blocking code: no cancellation and no signal can get between its steps. A start that is under way
    in a thread is waited for first, or its server would outlive us.
    """
    with ExitStack() as closing:
        for server in servers:
            closing.callback(server.close)
        yield closing.enter_context(ThreadPoolExecutor(len(servers)))


async def _create_databases(postgres: EmbeddedPostgres) -> None:
    engine = create_async_engine(postgres.dsn(), isolation_level="AUTOCOMMIT")
    try:
        async with engine.connect() as connection:
            for statement in _DATABASES:
                await connection.exec_driver_sql(statement)
    finally:
        await engine.dispose()
