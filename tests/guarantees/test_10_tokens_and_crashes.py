"""A token that was given before the commit, and a primary that crashed before it: found by the crash lab, seed 101."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox import SyncManager, SyncState, SyncStatus, SyncToken
from outbox.migrate import migrate
from outbox.record import record
from outbox.testing.postgres import EmbeddedPostgres
from tests.forgetful import forgetful_server, log_held
from tests.relaying import change, manager_of, raw
from tests.scripted import ScriptedSecondary

MANY = 3


@asynccontextmanager
async def quiet_primary() -> AsyncIterator[tuple[EmbeddedPostgres, AsyncEngine]]:
    """A server to crash, which forgets what was not committed, with the tables in it."""
    with forgetful_server() as server:
        engine = create_async_engine(server.dsn())
        await migrate(engine)
        yield server, engine
        await engine.dispose()


async def swallowed(server: EmbeddedPostgres, engine: AsyncEngine, resource_id: str) -> SyncToken:
    """The token of a transaction whose end the server did not live to see."""
    async with raw(engine) as connection:
        with log_held(server) as crash:
            await connection.transaction().start()
            token = await record(connection, [change(f"{resource_id}-{number}") for number in range(MANY)])
            crash()
    server.start()
    await engine.dispose()
    return token


async def committed(engine: AsyncEngine, resource_id: str) -> SyncToken:
    async with engine.begin() as connection:
        return await record(connection, [change(f"{resource_id}-{number}") for number in range(MANY)])


async def swallowed_and_given_again(server: EmbeddedPostgres, engine: AsyncEngine) -> tuple[SyncToken, SyncToken]:
    """Two tokens that name the same transaction id and the same positions, of which only the second committed."""
    lost, kept = await swallowed(server, engine, "lost"), await committed(engine, "kept")
    [first], [second] = lost.recorded, kept.recorded
    assert (first.transaction_id, first.runs) == (second.transaction_id, second.runs), "nothing was given again"
    return lost, kept


async def said(manager: SyncManager, *tokens: SyncToken) -> SyncStatus:
    return (await manager.wait_for_sync(SyncToken.merged(tokens), timeout=0))["search"]


async def test_a_token_of_what_a_crash_swallowed_is_not_taken_for_another_event() -> None:
    """W2, W3, A7: what is at its positions by now is somebody else's, whatever became of that."""
    secondary = ScriptedSecondary("search")
    async with quiet_primary() as (server, engine):
        manager = manager_of(engine, secondary)
        await manager.register()
        lost, kept = await swallowed_and_given_again(server, engine)
        for done in (0, MANY):
            alone, another, both = await said(manager, lost), await said(manager, kept), await said(manager, lost, kept)
            assert (alone.state, alone.events, alone.done) == (SyncState.ROLLED_BACK, MANY, 0)
            assert (another.state, another.done) == (SyncState.APPLIED if done else SyncState.ACCEPTED, done)
            assert (both.state, both.events, both.done) == (SyncState.ROLLED_BACK, 2 * MANY, done)
            await manager.relay().drain()
        await manager.aclose()
    assert {event.resource_id for event in secondary.history} == {f"kept-{number}" for number in range(MANY)}
