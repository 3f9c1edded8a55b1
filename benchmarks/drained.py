"""Processes that drain what is owed, as relays or as the floor, and how fast they are together.

The floor is the least that PostgreSQL allows: select for update skip locked, then delete, in one transaction, its
content in the claimed row; no lease, no record of an attempt, no order. All are loaded before any begins, and the clock
starts when every one of them has had its first batch.
"""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import asyncpg
import msgspec
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.ground import CONTENT, Nothing, fill
from outbox import Outcome, SyncConfig, SyncEvent, SyncManager

FLOOR_TABLE = "create table floor (id bigint generated always as identity primary key, content json not null)"
FLOOR_FILL = "insert into floor (content) select $2::json from generate_series(1, $1)"
FLOOR_CLAIM = "select id, content from floor order by id limit $1 for update skip locked"
FLOOR_DELETE = "delete from floor where id = any ($1)"
_LOOK = 0.002
# Whoever was handed nothing for so long is done: the others have the rest.
_IDLE = 5.0
# One of several that never came to have a batch gives up, and a relay that does not come to an end fails.
_LEFT_OUT, _PATIENCE = 20.0, 900.0


class Asked(msgspec.Struct):
    """What a process is to do, until nothing comes any more or, with `most`, until it had so many deliveries."""

    dsn: str
    batch: int
    floor: bool = False
    secondaries: Sequence[str] = ("nothing",)
    most: int | None = None


class Marks(msgspec.Struct):
    """How many deliveries each batch had, and when it was handed over; at the end the process's peak memory."""

    sizes: list[int]
    times: list[float]
    total: int = 0
    peak_mb: float = 0

    def add(self, size: int) -> None:
        self.total += size
        self.sizes.append(size)
        self.times.append(time.monotonic())

    def done(self, most: int | None) -> bool:
        """Say whether there was enough or, where nobody knows how much that is, nothing for a while."""
        if most is not None:
            return self.total >= most
        return bool(self.times) and time.monotonic() - self.times[-1] > _IDLE


class Drain(NamedTuple):
    """Deliveries in all, how many per second once all had begun, and the largest peak memory in MB."""

    deliveries: int
    rate: float
    peak_mb: float


class Marked(Nothing):
    """A secondary that keeps nothing but what each batch's size and time were."""

    def __init__(self, backend_id: str, marks: Marks) -> None:
        super().__init__(backend_id)
        self._marks = marks

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        outcomes = await super().apply(batch)
        self._marks.add(len(batch))
        return outcomes


async def drained(asked: Asked, processes: int = 1) -> Drain:
    """Run so many processes at once until all is drained."""
    async with AsyncExitStack() as opened:
        children = [await opened.enter_async_context(_process(asked)) for _ in range(processes)]
        for child in children:
            assert child.stdout is not None
            assert await child.stdout.readline() == b"ready\n", "a process that drains failed"
        answers = await asyncio.gather(*(child.communicate(b"go\n") for child in children))
    marks = [msgspec.json.decode(answer, type=Marks) for answer, _ in answers]
    # One that came too late for any batch has no say.
    began = [each for each in marks if each.times]
    start, end = max(each.times[0] for each in began), max(each.times[-1] for each in began)
    assert end > start, "one batch each shows no rate"
    counted = sum(size for each in began for size, at in zip(each.sizes, each.times, strict=True) if at > start)
    return Drain(sum(each.total for each in began), counted / (end - start), max(each.peak_mb for each in marks))


async def filled(
    dsn: str, events: int, *, tenants: int = 100, content: str = CONTENT, secondaries: Sequence[str] = ("nothing",)
) -> None:
    """Have exactly these events owed to these secondaries and nothing else."""
    engine = create_async_engine(dsn.replace("postgresql://", "postgresql+asyncpg://"))
    await SyncManager(engine, [Nothing(name) for name in secondaries]).register()
    await engine.dispose()
    connection = await asyncpg.connect(dsn)
    await connection.execute("truncate outbox, outbox_delivery, outbox_attempt, outbox_hold")
    await fill(connection, events, tenants=tenants, content=content, backend_ids=secondaries)
    await connection.execute("vacuum analyze outbox, outbox_delivery")
    await connection.execute("checkpoint")
    await connection.close()


async def floor_filled(dsn: str, events: int) -> None:
    """Have so many rows for the floor."""
    connection = await asyncpg.connect(dsn)
    await connection.execute("drop table if exists floor")
    await connection.execute(FLOOR_TABLE)
    await connection.execute(FLOOR_FILL, events, CONTENT)
    await connection.execute("vacuum analyze floor")
    await connection.execute("checkpoint")
    await connection.close()


@asynccontextmanager
async def _process(asked: Asked) -> AsyncIterator[asyncio.subprocess.Process]:
    command = [sys.executable, "-m", "benchmarks.drained", msgspec.json.encode(asked).decode()]
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def _floor(asked: Asked, marks: Marks) -> None:
    connection, secondary = await asyncpg.connect(asked.dsn), Nothing()
    while True:
        async with connection.transaction():
            rows = await connection.fetch(FLOOR_CLAIM, asked.batch)
            if not rows:
                break
            secondary.characters += sum(len(row[1]) for row in rows)
            await connection.execute(FLOOR_DELETE, [row[0] for row in rows])
        marks.add(len(rows))
    await connection.close()


async def _relay(asked: Asked, marks: Marks) -> None:
    engine = create_async_engine(asked.dsn.replace("postgresql://", "postgresql+asyncpg://"))
    secondaries = [Marked(name, marks) for name in asked.secondaries]
    relay = SyncManager(engine, secondaries, config=SyncConfig(batch_size=asked.batch, doorbell=False)).relay()
    running, started = asyncio.create_task(relay.run()), time.monotonic()
    while not marks.done(asked.most) and not running.done():
        waited = time.monotonic() - started
        assert waited < _PATIENCE, f"{marks.total} of {asked.most} deliveries came"
        if asked.most is None and not marks.times and waited > _LEFT_OUT:
            break
        await asyncio.sleep(_LOOK)
    relay.stop()
    await running
    await engine.dispose()


def main() -> None:
    asked = msgspec.json.decode(sys.argv[1], type=Asked)
    print("ready", flush=True)
    sys.stdin.readline()
    marks = Marks([], [])
    asyncio.run((_floor if asked.floor else _relay)(asked, marks))
    marks.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(msgspec.json.encode(marks).decode(), flush=True)


if __name__ == "__main__":
    main()
