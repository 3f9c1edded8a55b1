"""A relay and a primary behind a network that swallows everything: no answer, no reset, for ever (L9, W11)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox import SyncEvent, SyncManager, SyncToken, record
from outbox.primary import PRIMARY_FAILED, Primary
from outbox.testing.proxy import Proxy
from tests.relaying import change, manager_of, pending, quick, running, value
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

# The server ends a statement after this; from twice as long on nobody listens any more.
_STATEMENT = 1.0
_KEPT = "select lease_until > clock_timestamp() from outbox_attempt where finished_at is null"


@pytest.fixture
async def proxy(primary: AsyncEngine) -> AsyncIterator[Proxy]:
    assert primary.url.port is not None
    async with Proxy(primary.url.port, {}) as proxy:
        yield proxy


@pytest.fixture
async def behind(primary: AsyncEngine, proxy: Proxy) -> AsyncIterator[AsyncEngine]:
    """An engine whose connections go through the proxy."""
    engine = create_async_engine(primary.url.set(port=proxy.port))
    yield engine
    await engine.dispose()


@pytest.fixture
def secondary() -> ScriptedSecondary:
    return ScriptedSecondary("search")


@pytest.fixture
async def manager(behind: AsyncEngine, secondary: ScriptedSecondary) -> AsyncIterator[SyncManager]:
    manager = manager_of(behind, secondary, statement_timeout=_STATEMENT, lease=_STATEMENT)
    await manager.register()
    yield manager
    await manager.aclose()


def swallow(proxy: Proxy) -> None:
    """From now on nothing comes through on any connection there is; new ones are not touched."""
    for link in proxy.links:
        link.hole = True


async def carried(primary: AsyncEngine, *events: SyncEvent) -> None:
    async with primary.begin() as connection:
        await record(connection, *events)
    await eventually(lambda: _nothing_owed(primary))


async def _nothing_owed(primary: AsyncEngine) -> bool:
    return await pending(primary) == 0


async def test_a_relay_whose_network_swallows_everything_goes_on_over_new_connections(
    primary: AsyncEngine, proxy: Proxy, manager: SyncManager, secondary: ScriptedSecondary
) -> None:
    """L9: claims and heartbeats both; else it would be alive and carry nothing until the kernel gives up."""
    async with running(manager.relay()):
        await carried(primary, change("before"))
        swallow(proxy)
        await carried(primary, change("after"))
        # Longer than a lease: without a heartbeat anybody else could take it over.
        secondary.hang()
        async with primary.begin() as connection:
            await record(connection, change("long"))
        await eventually(lambda: secondary.running)
        await asyncio.sleep(3 * _STATEMENT)
        # A busy machine may be late with one heartbeat, but without any it is never true again.
        await eventually(lambda: value(primary, _KEPT))
        secondary.release()
        await eventually(lambda: _nothing_owed(primary))


@pytest.mark.parametrize("how", ["stop", "cancel"])
async def test_a_relay_whose_network_swallows_everything_ends_in_bounded_time(
    primary: AsyncEngine, proxy: Proxy, manager: SyncManager, how: str
) -> None:
    """L9: a relay that cannot be stopped is killed by whoever supervises it."""
    relay = manager.relay()
    task = asyncio.create_task(relay.run())
    await carried(primary, change("before"))
    swallow(proxy)
    await asyncio.sleep(0.1)
    began = time.monotonic()
    relay.stop(at_once=True) if how == "stop" else task.cancel()
    done, _ = await asyncio.wait({task}, timeout=60)
    assert done
    assert time.monotonic() - began < 20


async def test_idle_connections_that_a_network_dropped_are_not_taken_over_for_ever(
    primary: AsyncEngine,
    proxy: Proxy,
    behind: AsyncEngine,
    manager: SyncManager,
    secondary: ScriptedSecondary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """L9: what the application's pool hands out was never asked whether anybody is still at its other end."""
    monkeypatch.setattr("outbox.primary._ANSWERS_WITHIN", _STATEMENT)
    async with running(manager.relay()):
        await carried(primary, change("before"))
        async with AsyncExitStack() as idle:
            for _ in range(3):
                await idle.enter_async_context(behind.connect())
        swallow(proxy)
        await carried(primary, change("after"))
        assert len(secondary.held) == 2


@pytest.mark.parametrize("asks_first", [False, True])
async def test_taking_over_a_connection_that_nobody_answers_on_fails_in_bounded_time(
    primary: AsyncEngine, proxy: Proxy, asks_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L9: whether the application's pool hands it out as it is, or waits for an answer before."""
    monkeypatch.setattr("outbox.primary._ANSWERS_WITHIN", _STATEMENT)
    engine = create_async_engine(primary.url.set(port=proxy.port), pool_pre_ping=asks_first)
    async with engine.connect():
        pass
    swallow(proxy)
    connections = Primary(engine, quick())
    await connections.open()
    taking_over = asyncio.create_task(connections.reserved())
    done, _ = await asyncio.wait({taking_over}, timeout=20)
    assert done
    assert isinstance(taking_over.exception(), PRIMARY_FAILED)
    async with connections.connection() as connection:
        assert await connection.fetchval("select 1") == 1
    await connections.close()
    for link in proxy.links:
        link.cut()
    await engine.dispose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_who_waits_is_answered_again_over_a_new_connection(
    primary: AsyncEngine, behind: AsyncEngine, proxy: Proxy, driver: str
) -> None:
    """W11: a question that nobody answers must not be the last that this process asks, whatever the driver."""
    engine = create_async_engine(behind.url.set(drivername=f"postgresql+{driver}"))
    manager = manager_of(engine, ScriptedSecondary("search"))
    await manager.register()
    async with running(manager_of(primary, ScriptedSecondary("search")).relay()):
        token = await _token(primary)
        assert (await manager.wait_for_sync(token, timeout=20)).synced
        swallow(proxy)
        lost = await manager.wait_for_sync(await _token(primary), timeout=0.5)
        assert not lost.synced
        again = await manager.wait_for_sync(await _token(primary), timeout=timedelta(seconds=20))
        assert again.synced
    for link in proxy.links:
        link.cut()
    await manager.aclose()
    await engine.dispose()


async def _token(primary: AsyncEngine) -> SyncToken:
    async with primary.begin() as connection:
        return await record(connection, change("waited for"))
