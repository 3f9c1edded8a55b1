"""What the tests of the relaying side share: short settings, writing, running a relay, looking at the tables."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Registration, Relay, SyncConfig, SyncEvent, SyncManager
from outbox.attempt import Attempt
from outbox.claim import claim
from outbox.lanes import Lanes
from outbox.load import load
from outbox.resume import resume
from outbox.secondaries.base import Secondary
from outbox.testing.postgres import EmbeddedPostgres
from outbox.turn import Turn, take_turn

TABLES = ("outbox", "outbox_delivery", "outbox_attempt", "outbox_hold", "outbox_discarded", "outbox_secondary")
_QUICK: dict[str, Any] = {
    # Long enough that a busy machine loses none by itself; tests of losses say less.
    "lease": 2.0,
    "poll_interval": 0.02,
    # For those who say a poll interval of a minute.
    "unhealthy_after_silence": 600,
    "retry_initial": 0.01,
    "retry_max": 0.05,
    "breaker_initial": 0.05,
    "breaker_max": 0.2,
    "prune_interval": 0.2,
    "shutdown_grace": 2.0,
    "doorbell": False,
}


def quick(**settings: Any) -> SyncConfig:
    """Settings with short times. Durations may be given in seconds."""
    return SyncConfig(**(_QUICK | settings))


def manager_of(
    engine: AsyncEngine, *secondaries: Secondary | Registration, retry: Any = None, **settings: Any
) -> SyncManager:
    """A manager with short times."""
    return SyncManager(engine, secondaries, config=quick(**settings), retry=retry)


def change(resource_id: str, value: int = 0, *, tenant: str = "default") -> SyncEvent:
    """An update of one resource."""
    return SyncEvent.update("Thing", resource_id, f'{{"value":{value}}}', tenant_id=tenant)


def removal(resource_id: str, *, tenant: str = "default") -> SyncEvent:
    """The delete of one resource."""
    return SyncEvent.delete("Thing", resource_id, tenant_id=tenant)


async def write(manager: SyncManager, *events: SyncEvent) -> None:
    """Commit events in one transaction."""
    async with manager.session() as session, session.begin():
        session.record(*events)


@asynccontextmanager
async def running(*relays: Relay) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Run relays beside each other and stop them in order; one that fails fails the test at once."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(relay.run()) for relay in relays]
            try:
                yield tasks
            finally:
                for relay in relays:
                    relay.stop(at_once=True)
                await asyncio.wait(tasks, timeout=30)
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


async def rows(engine: AsyncEngine, sql: str, **parameters: Any) -> list[dict[str, Any]]:
    """The rows of a query, as dicts."""
    async with engine.connect() as connection:
        return [dict(row) for row in (await connection.execute(text(sql), parameters)).mappings()]


async def value(engine: AsyncEngine, sql: str, **parameters: Any) -> Any:
    """The first column of a query's first row."""
    (first, *_) = await rows(engine, sql, **parameters)
    return next(iter(first.values()))


async def execute(engine: AsyncEngine, sql: str, **parameters: Any) -> None:
    """Run a statement by hand, and commit it."""
    async with engine.begin() as connection:
        await connection.execute(text(sql), parameters)


async def everything(engine: AsyncEngine) -> dict[str, list[str]]:
    """Every row of every table, as text: for comparing before and after."""
    found = {}
    for table in TABLES:
        listed = await rows(engine, f"select cast(whole as text) as whole from {table} as whole order by 1")
        found[table] = [row["whole"] for row in listed]
    return found


async def hold_of(engine: AsyncEngine, resource_id: str) -> dict[str, Any] | None:
    """The hold of a resource, None when there is none."""
    found = await rows(engine, "select * from outbox_hold where resource_id = :id", id=resource_id)
    return found[0] if found else None


async def pending(engine: AsyncEngine, backend_id: str | None = None) -> int:
    """How many deliveries are owed."""
    sql = "select coalesce(sum(pending), 0) from outbox_lag where cast(:id as text) is null or backend_id = :id"
    return int(await value(engine, sql, id=backend_id))


def dsn_of(engine: AsyncEngine) -> str:
    """The engine's URL, password included."""
    return engine.url.render_as_string(hide_password=False)


@asynccontextmanager
async def raw(engine: AsyncEngine) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A driver connection of its own to the engine's database."""
    connection = await asyncpg.connect(dsn_of(engine).replace("postgresql+asyncpg", "postgresql"))
    try:
        yield connection
    finally:
        await connection.close()


async def claim_by_hand(engine: AsyncEngine, backend_id: str, **terms: Any) -> Attempt | None:
    """Claim as a relay would that is then never heard of again."""
    async with raw(engine) as connection, connection.transaction():
        return await claim_on(connection, backend_id, **terms)


async def claim_on(
    connection: asyncpg.Connection[Any],
    backend_id: str,
    *,
    lanes: Lanes | None = None,
    batch_size: int = 100,
    lease: timedelta = timedelta(milliseconds=1),
    relay_id: UUID | None = None,
) -> Attempt | None:
    """Claim in the connection's transaction: due holds first, then fresh deliveries."""
    turn = await take_turn(connection, "public", backend_id)
    assert turn is not None
    relay_id = relay_id or uuid4()
    resumed = await resume(
        connection,
        "public",
        backend_id=backend_id,
        relay_id=relay_id,
        turn=turn,
        batch_size=batch_size,
        lanes=lanes or Lanes(),
        lease=lease,
    )
    if resumed.attempt_id is None:
        return None
    return await load_opened(connection, turn, backend_id, relay_id, resumed.attempt_id)


async def load_opened(
    connection: asyncpg.Connection[Any], turn: Turn, backend_id: str, relay_id: UUID, attempt_id: int
) -> Attempt:
    """Load an attempt that was opened just now."""
    names: dict[str, Any] = {"backend_id": backend_id, "relay_id": relay_id, "attempt_id": attempt_id}
    attempt = await load(connection, "public", **names, log_order=turn.log_order, held=True, batch_bytes=2**24)
    assert attempt is not None
    return attempt


async def claim_fresh(engine: AsyncEngine, backend_id: str, *, lanes: Lanes, batch_size: int = 100) -> list[Attempt]:
    """Claim only what waits for the first time, as far as these lanes let it be seen."""
    async with raw(engine) as connection, connection.transaction():
        turn = await take_turn(connection, "public", backend_id)
        assert turn is not None
        relay_id = uuid4()
        opened = await claim(
            connection,
            "public",
            backend_id=backend_id,
            relay_id=relay_id,
            turn=turn,
            batch_size=batch_size,
            lanes=lanes,
            lease=timedelta(minutes=1),
        )
        return [await load_opened(connection, turn, backend_id, relay_id, attempt_id) for attempt_id in opened]


@contextmanager
def own_server(**settings: str) -> Iterator[EmbeddedPostgres]:
    """A server that a test may crash: what it acknowledged is on disk."""
    with EmbeddedPostgres(settings=settings) as server:
        yield server
