"""What recording costs a business transaction: `record()` against hand-written SQL, and against not recording.

    python -m benchmarks.writer_overhead [--runs 5] [--transactions 2000]

One transaction inserts one business row and one event of 500 bytes for three secondaries. By hand, the same rows with
the same columns and the same expressions go out in one prepared statement, which knows the secondaries beforehand.
All variants take turns in short blocks, and ratios are taken run by run. The sessions are compared with each other.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import count
from typing import Any

import asyncpg
from sqlalchemy import BigInteger, Text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.ground import CONTENT, Nothing, Row, outbox_database
from outbox import SyncConfig, SyncEvent, SyncManager, record
from outbox.testing.postgres import EmbeddedPostgres

SECONDARIES = ("one", "two", "three")
BUSINESS_TABLE = "create table business (id bigint primary key, content text not null)"
BUSINESS = "insert into business (id, content) values ($1, $2)"
BY_HAND = """
with event as (
    insert into outbox
        (tenant_id, resource_type, resource_id, operation, version, fhir_version, content, bulk_id, headers)
    values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
    returning event_id
)
insert into outbox_delivery (backend_id, lane, event_id, key_hash)
select secondary.backend_id, cast(hashtextextended($1, 0) & 63 as smallint), event.event_id,
       hashtextextended($1 || '/' || $2 || '/' || $3, 0)
from event cross join (values ('one'), ('two'), ('three')) as secondary (backend_id)
"""
EMPTY = "truncate business, outbox, outbox_delivery"
BLOCKS = 10
GOAL = 0.9

Transaction = Callable[[int], Awaitable[Any]]
Variant = Callable[[asyncpg.Connection, AsyncEngine], Awaitable[Transaction]]


class Base(DeclarativeBase):
    pass


class Business(Base):
    __tablename__ = "business"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    content: Mapped[str] = mapped_column(Text)


async def bare(connection: asyncpg.Connection, _engine: AsyncEngine) -> Transaction:
    business = await connection.prepare(BUSINESS)

    async def transaction(number: int) -> None:
        async with connection.transaction():
            await business.fetch(number, CONTENT)

    return transaction


async def by_hand(connection: asyncpg.Connection, _engine: AsyncEngine) -> Transaction:
    business, event = await connection.prepare(BUSINESS), await connection.prepare(BY_HAND)

    async def transaction(number: int) -> None:
        async with connection.transaction():
            await business.fetch(number, CONTENT)
            await event.fetch("tenant-1", "Observation", str(number), "update", "1", "4.0", CONTENT, None, None)

    return transaction


async def recorded(connection: asyncpg.Connection, _engine: AsyncEngine) -> Transaction:
    business = await connection.prepare(BUSINESS)
    # Made before, because by hand nothing is checked either.
    events = [_event(number) for number in range(100)]

    async def transaction(number: int) -> None:
        async with connection.transaction():
            await business.fetch(number, CONTENT)
            await record(connection, events[number % 100])

    return transaction


async def checked_and_recorded(connection: asyncpg.Connection, _engine: AsyncEngine) -> Transaction:
    business = await connection.prepare(BUSINESS)

    async def transaction(number: int) -> None:
        async with connection.transaction():
            await business.fetch(number, CONTENT)
            await record(connection, _event(number))

    return transaction


async def plain_session(_connection: asyncpg.Connection, engine: AsyncEngine) -> Transaction:
    async def transaction(number: int) -> None:
        async with AsyncSession(engine) as session, session.begin():
            session.add(Business(id=number, content=CONTENT))

    return transaction


async def outbox_session(_connection: asyncpg.Connection, engine: AsyncEngine) -> Transaction:
    manager = SyncManager(engine, config=SyncConfig(doorbell=False))

    async def transaction(number: int) -> None:
        async with manager.session() as session, session.begin():
            session.add(Business(id=number, content=CONTENT))
            session.record(_event(number))

    return transaction


def _event(number: int) -> SyncEvent:
    return SyncEvent.update("Observation", str(number), CONTENT, tenant_id="tenant-1", version="1", fhir_version="4.0")


VARIANTS = {
    variant.__name__: variant
    for variant in (bare, by_hand, recorded, checked_and_recorded, plain_session, outbox_session)
}
RATIOS: list[tuple[str, str, str, float | None]] = [
    ("record() / by hand", "recorded", "by_hand", GOAL),
    ("record() / no event", "recorded", "bare", None),
    ("by hand / no event", "by_hand", "bare", None),
    ("make and record() / by hand", "checked_and_recorded", "by_hand", None),
    ("outbox session / session", "outbox_session", "plain_session", None),
]


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0, events: int = 2_000) -> AsyncIterator[Row]:
    """Yield a row for each ratio, at one and at eight connections."""
    transactions = max(8 * BLOCKS, int(events * scale))
    async with outbox_database(server) as name:
        await _prepare(server.dsn(name))
        dsn = server.dsn(name, driver="postgresql")
        for connections in (1, 8):
            measured = [await rates(dsn, connections, transactions, run) for run in range(runs)]
            medians = {name: statistics.median(each[name] for each in measured) for name in VARIANTS}
            for what, above, below, least in RATIOS:
                per_second = f"{medians[above]:,.0f} / {medians[below]:,.0f} tx/s"
                values = [each[above] / each[below] for each in measured]
                yield Row(f"{what}, {connections} conn. ({per_second})", values, least=least)


async def rates(dsn: str, connections: int, transactions: int, run: int) -> dict[str, float]:
    """Transactions per second of each variant, all taking turns block by block so that noise hits them alike."""
    engine = create_async_engine(dsn.replace("postgresql://", "postgresql+asyncpg://"), pool_size=connections)
    opened = [await asyncpg.connect(dsn) for _ in range(connections)]
    await opened[0].execute(EMPTY)
    await opened[0].execute("checkpoint")
    made = {name: [await variant(each, engine) for each in opened] for name, variant in VARIANTS.items()}
    elapsed, size, numbers = dict.fromkeys(made, 0.0), transactions // connections // BLOCKS, count()
    for block in range(-1, BLOCKS):
        for name in _turned(list(made), run + block):
            started = time.perf_counter()
            await asyncio.gather(*(_repeat(transaction, numbers, size) for transaction in made[name]))
            # The first block warms caches and plans up.
            elapsed[name] += time.perf_counter() - started if block >= 0 else 0
    for connection in opened:
        await connection.close()
    await engine.dispose()
    return {name: size * BLOCKS * connections / seconds for name, seconds in elapsed.items()}


def _turned(names: list[str], turn: int) -> list[str]:
    """Who comes first, and who after whom, changes from block to block."""
    first = turn % len(names)
    order = names[first:] + names[:first]
    return order if turn % 2 else order[::-1]


async def _repeat(transaction: Transaction, numbers: Iterator[int], times: int) -> None:
    for _ in range(times):
        await transaction(next(numbers))


async def _prepare(url: str) -> None:
    engine = create_async_engine(url)
    await SyncManager(engine, [Nothing(name) for name in SECONDARIES]).register()
    async with engine.begin() as connection:
        await connection.exec_driver_sql(BUSINESS_TABLE)
    await engine.dispose()


async def measure(server: EmbeddedPostgres, runs: int, transactions: int) -> None:
    async for row in rows(server, runs, events=transactions):
        print(row, flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--transactions", type=int, default=2_000)
    given = arguments.parse_args()
    with EmbeddedPostgres() as server:
        asyncio.run(measure(server, given.runs, given.transactions))


if __name__ == "__main__":
    main()
