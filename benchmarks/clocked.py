"""A relay in a process of its own whose secondary notes when it was asked to apply each event.

CLOCK_MONOTONIC is one clock for all processes of a machine, so its readings here and there may be subtracted.
"""

from __future__ import annotations

import asyncio
import bisect
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any

import asyncpg
import msgspec
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.ground import Nothing
from outbox import SyncConfig, SyncEvent, SyncManager
from outbox.errors import Unavailable
from outbox.secondaries.base import Outcome
from outbox.testing.postgres import EmbeddedPostgres

RAW_TABLE = "create table raw (id bigint generated always as identity primary key, name text, content json not null)"
RAW_CLAIM = "select id, name, content from raw order by id limit 100 for update skip locked"
RAW_DELETE = "delete from raw where id = any ($1)"
RAW_CHANNEL = "raw"
WARM = "warm"
OTHER = "other"
_LOOK = 0.005
_PATIENCE = 60.0


class Noted(msgspec.Struct):
    """When each event was applied, by its resource's id, and how many events had been by which time."""

    applied: dict[str, float]
    progress: list[tuple[int, float]]

    def when(self, events: int) -> float:
        """Return when so many events had been applied."""
        return self.progress[bisect.bisect_left(self.progress, events, key=lambda each: each[0])][1]


class Asked(msgspec.Struct):
    """What the process is to do: as a relay with these settings, or as the least that would do, with LISTEN.

    Resources whose id begins with `noise` are counted and not noted. `other` is how a second secondary, if there is
    one, does: `well` or `dead`.
    """

    url: str
    raw: bool = False
    noise: str | None = None
    other: str | None = None
    doorbell: bool = True
    poll_interval: timedelta = timedelta(milliseconds=200)
    batch_size: int = 100

    @property
    def config(self) -> SyncConfig:
        return SyncConfig(doorbell=self.doorbell, poll_interval=self.poll_interval, batch_size=self.batch_size)


class Clocked(Nothing):
    """A secondary that keeps nothing but the time; of what comes again, the first time counts."""

    def __init__(self, noise: str | None = None) -> None:
        super().__init__()
        self.noted = Noted({}, [])
        self._noise = noise

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        now = time.monotonic()
        self.note([each.resource_id for each in batch], now)
        return await super().apply(batch)

    def note(self, names: Sequence[str], now: float) -> None:
        for name in names:
            if self._noise is None or not name.startswith(self._noise):
                self.noted.applied.setdefault(name, now)
        carried = self.noted.progress[-1][0] if self.noted.progress else 0
        self.noted.progress.append((carried + len(names), now))


class Dead(Nothing):
    """A secondary that refuses every call at once."""

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        raise Unavailable("refused", "dead")


class RelayProcess:
    """That process, seen from outside: `go`, then `warm`, at last `finish`."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        self._child, self._to, self._from = child, child.stdin, child.stdout

    async def go(self) -> None:
        """Have it begin, once all is loaded."""
        assert await self._from.readline() == b"loaded\n", "the relay's process failed"
        self._to.write(b"go\n")

    async def warm(self) -> None:
        """Return when it has applied something."""
        assert await self._from.readline() == b"warm\n", "the relay's process failed"

    async def finish(self, events: int) -> Noted:
        """Let it apply so many events in all, and return what it noted."""
        self._to.write(f"{events}\n".encode())
        said = (await self._from.read()).splitlines()
        assert await self._child.wait() == 0, "the relay's process failed"
        return msgspec.json.decode(said[-1], type=Noted)


@asynccontextmanager
async def relay_process(asked: Asked) -> AsyncIterator[RelayProcess]:
    """Start the process; it is ended with the block at the latest."""
    command = [sys.executable, "-m", "benchmarks.clocked", msgspec.json.encode(asked).decode()]
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        yield RelayProcess(child)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def emptied(server: EmbeddedPostgres, database: str) -> None:
    """Have nothing owed and the secondary registered, as before the first run."""
    engine = create_async_engine(server.dsn(database))
    await SyncManager(engine, [Nothing()]).register()
    await engine.dispose()
    connection = await asyncpg.connect(server.dsn(database, driver="postgresql"))
    await connection.execute("truncate outbox, outbox_delivery, outbox_attempt, outbox_hold")
    await connection.execute("drop table if exists raw")
    await connection.execute(RAW_TABLE)
    await connection.execute("checkpoint")
    await connection.close()


async def _relay(asked: Asked, clocked: Clocked) -> None:
    engine = create_async_engine(asked.url)
    others = {"well": [Nothing(OTHER)], "dead": [Dead(OTHER)]}.get(asked.other or "", [])
    relay = SyncManager(engine, [clocked, *others], config=asked.config).relay()
    try:
        await relay.run()
    finally:
        await engine.dispose()


async def _raw(asked: Asked, clocked: Clocked) -> None:
    """What any relay has to do at the very least: hear, claim, apply, forget; no lease, no order, no record."""
    bell, dsn = asyncio.Event(), asked.url.replace("postgresql+asyncpg", "postgresql")
    listening, connection = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    await listening.add_listener(RAW_CHANNEL, lambda *_: bell.set())
    while True:
        bell.clear()
        while await _taken(connection, clocked):
            pass
        await bell.wait()


async def _taken(connection: asyncpg.Connection[Any], clocked: Clocked) -> int:
    async with connection.transaction():
        if rows := await connection.fetch(RAW_CLAIM):
            clocked.note([row[1] for row in rows], time.monotonic())
            clocked.characters += sum(len(row[2]) for row in rows)
            await connection.execute(RAW_DELETE, [row[0] for row in rows])
    return len(rows)


async def _child(asked: Asked) -> None:
    clocked = Clocked(asked.noise)
    print("loaded", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    running = asyncio.create_task((_raw if asked.raw else _relay)(asked, clocked))
    finishing = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
    while not clocked.noted.progress and not running.done():
        await asyncio.sleep(_LOOK)
    print("warm", flush=True)
    await asyncio.wait({running, finishing}, return_when=asyncio.FIRST_COMPLETED)
    if not running.done():
        events, deadline = int(finishing.result()), time.monotonic() + _PATIENCE
        while clocked.noted.progress[-1][0] < events and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK)
        running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    print(msgspec.json.encode(clocked.noted).decode(), flush=True)


if __name__ == "__main__":
    asyncio.run(_child(msgspec.json.decode(sys.argv[1], type=Asked)))
