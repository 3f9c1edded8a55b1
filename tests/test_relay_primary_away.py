"""A relay and a primary that is not there: before it starts, in the middle of work, for a moment or for long (S2)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox import SyncConfig, SyncManager
from outbox.migrate import migrate
from outbox.primary import PRIMARY_FAILED, Primary
from outbox.testing.postgres import EmbeddedPostgres
from tests.relaying import change, execute, hold_of, manager_of, own_server, pending, rows, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

TERMINATE = """
select count(pg_terminate_backend(pid)) from pg_stat_activity
where datname = current_database() and application_name = 'outbox relay'
"""


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    """A server that the tests of this file stop and start again."""
    with own_server() as server:
        asyncio.run(_prepare(server.dsn()))
        yield server


async def _prepare(dsn: str) -> None:
    engine = create_async_engine(dsn)
    await migrate(engine)
    await engine.dispose()


@pytest.fixture
async def fragile(server: EmbeddedPostgres) -> AsyncIterator[AsyncEngine]:
    """An engine on that server, with empty tables."""
    await asyncio.to_thread(server.start)
    engine = create_async_engine(server.dsn())
    await execute(engine, "truncate outbox, outbox_delivery, outbox_attempt, outbox_hold, outbox_secondary")
    yield engine
    await engine.dispose()
    await asyncio.to_thread(server.start)


async def nothing_owed(engine: AsyncEngine) -> bool:
    return await pending(engine) == 0


async def one(engine: AsyncEngine, **settings: object) -> tuple[ScriptedSecondary, SyncManager]:
    secondary = ScriptedSecondary("search")
    manager = manager_of(engine, secondary, **settings)
    await manager.register()
    return secondary, manager


async def test_a_relay_started_before_its_database_begins_when_that_comes(
    server: EmbeddedPostgres, fragile: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """S2: it waits with growing pauses, and says why without a password or an address."""
    secondary, manager = await one(fragile)
    await write(manager, change("1"))
    await fragile.dispose()
    await asyncio.to_thread(server.stop)
    async with running(manager.relay()):
        await eventually(lambda: caplog.text.count("does not answer") >= 3)
        assert "ConnectionRefusedError" in caplog.text
        await asyncio.to_thread(server.start)
        await eventually(lambda: secondary.held, timedelta(seconds=30))


@pytest.mark.parametrize("how", ["stop", "crash"])
async def test_a_relay_comes_back_after_its_database_did(
    server: EmbeddedPostgres, fragile: AsyncEngine, how: str
) -> None:
    """S2, D2: idle when it went away, and again while a batch is out."""
    secondary, manager = await one(fragile, lease=60)
    async with running(manager.relay()):
        for resource_id in ("idle", "busy"):
            if resource_id == "busy":
                secondary.hang()
                await write(manager, change("busy"))
                await eventually(lambda: secondary.running)
            await asyncio.to_thread(server.crash if how == "crash" else server.stop)
            secondary.release()
            await asyncio.to_thread(server.start)
            await fragile.dispose()
            await write(manager, change(resource_id, 2))
            await eventually(lambda name=resource_id: _last(secondary, name), timedelta(seconds=30))
        await eventually(lambda: nothing_owed(fragile))
    status = await manager.backend_status("search")
    assert (status.lost, status.retried, status.pending) == (0, 0, 0)


def _last(secondary: ScriptedSecondary, resource_id: str) -> bool:
    return secondary.content_of("Thing", resource_id) == '{"value":2}'


async def test_what_is_out_for_longer_than_a_lease_without_a_primary_is_given_up(
    server: EmbeddedPostgres, fragile: AsyncEngine
) -> None:
    """L11: by then somebody else may have it, so this relay stops sending it."""
    secondary, manager = await one(fragile, lease=0.3)
    async with running(manager.relay()):
        await write(manager, change("1"))
        secondary.hang()
        await eventually(lambda: secondary.running or _send_again(manager))
        await asyncio.to_thread(server.crash)
        await eventually(lambda: secondary.calls and not secondary.running)
        assert secondary.calls[-1].ending == "CancelledError"
        secondary.release()
        await asyncio.to_thread(server.start)
        await fragile.dispose()
        await eventually(lambda: nothing_owed(fragile), timedelta(seconds=30))


async def _send_again(manager: SyncManager) -> None:
    await write(manager, change("1"))


async def test_an_outage_of_the_primary_spends_no_attempt(server: EmbeddedPostgres, fragile: AsyncEngine) -> None:
    """B3: the answer was there before the primary was; many leases later the relay settles what it knows."""
    secondary, manager = await one(fragile, lease=0.3)
    async with running(manager.relay()):
        for round_ in range(3):
            secondary.hang()
            await write(manager, change("1", round_))
            await eventually(lambda: secondary.running)
            await asyncio.to_thread(server.stop)
            secondary.release()
            await eventually(lambda: not secondary.running)
            down_since = asyncio.get_running_loop().time()
            await eventually(lambda since=down_since: asyncio.get_running_loop().time() - since > 0.6)
            await asyncio.to_thread(server.start)
            await fragile.dispose()
            await eventually(lambda: nothing_owed(fragile), timedelta(seconds=30))
    status = await manager.backend_status("search")
    assert (status.applied, status.stale, status.lost, status.retried) == (3, 0, 0, 0)


async def test_a_relay_whose_sessions_are_terminated_loses_and_delays_nothing(primary: AsyncEngine) -> None:
    """L11, S2: all its connections at once, ten times under load."""
    secondary, manager = await one(primary, batch_size=5, lease=5)
    terminated = 0
    async with running(manager.relay()):
        for round_ in range(10):
            await write(manager, *(change(str(number), round_) for number in range(40)))
            await eventually(lambda least=5 * round_: len(secondary.calls) > least)
            terminated += await value(primary, TERMINATE)
        await eventually(lambda: nothing_owed(primary))
    assert terminated >= 10
    newest = await rows(primary, "select resource_id, max(event_id) as position from outbox group by resource_id")
    held = {event.resource_id: event.position for event in secondary.held.values()}
    assert held == {row["resource_id"]: row["position"] for row in newest}


async def test_a_claim_that_can_never_work_is_not_tried_in_a_spin(
    primary: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """F7: somebody took a table away; the relay tries on with pauses, and goes on when it is there again."""
    secondary, manager = await one(primary)
    await write(manager, change("1"))
    await execute(primary, "alter table outbox_delivery rename to taken_away")
    async with running(manager.relay()):
        started = asyncio.get_running_loop().time()
        await eventually(lambda: caplog.text.count("claim failed") >= 8)
        assert asyncio.get_running_loop().time() - started > 0.3, "eight failures in no time"
        await execute(primary, "alter table taken_away rename to outbox_delivery")
        await eventually(lambda: secondary.held)


async def test_a_change_of_the_tables_in_mid_run_costs_no_attempt(primary: AsyncEngine) -> None:
    """S4: prepared statements whose tables changed fail once; that is the relay's matter, not the event's."""
    secondary, manager = await one(primary)
    async with running(manager.relay()):
        for number in range(3):
            await write(manager, change("1", number))
            await eventually(lambda count=number + 1: len(secondary.sent) == count)
            for table in ("outbox", "outbox_hold", "outbox_attempt", "outbox_secondary"):
                await execute(primary, f"alter table {table} add column extra_{number} integer")
        await write(manager, change("1", 9))
        await eventually(lambda: nothing_owed(primary))
    assert await hold_of(primary, "1") is None
    status = await manager.backend_status("search")
    assert (status.retried, status.lost) == (0, 0)


async def test_a_load_that_fails_is_tried_again_and_costs_no_attempt(
    primary: AsyncEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S2: between a claim and its events the primary may go away; the attempt is dispatched when it is back."""
    loaded_apart(monkeypatch)
    secondary, manager = await one(primary, lease=1)
    await write(manager, change("1"))
    await execute(primary, "alter table outbox rename to taken_away")
    async with running(manager.relay()):
        await eventually(lambda: caplog.text.count("load failed") >= 5)
        await execute(primary, "alter table taken_away rename to outbox")
        await eventually(lambda: nothing_owed(primary))
    assert (len(secondary.sent), await hold_of(primary, "1")) == (1, None)
    assert await value(primary, "select count(*) from outbox_attempt") == 1


def loaded_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have even a few events loaded by a statement of their own, as many always are."""
    monkeypatch.setattr("outbox.taking.FEW", -1)


async def test_what_was_never_loaded_is_handed_back_when_the_relay_stops(
    primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L6: the claim is committed, its events are still to come, and the relay is told to stop."""
    loaded_apart(monkeypatch)
    secondary, manager = await one(primary, shutdown_grace=0.5)
    await write(manager, change("1"))
    await execute(primary, "alter table outbox rename to taken_away")
    relay = manager.relay()
    async with running(relay):
        await eventually(lambda: value(primary, "select count(*) from outbox_attempt"))
        relay.stop()
        await asyncio.sleep(1)
        await execute(primary, "alter table taken_away rename to outbox")
    assert secondary.sent == []
    assert await rows(primary, "select released, lost from outbox_attempt") == [{"released": 1, "lost": 0}]


@pytest.mark.parametrize("doing", ["select pg_sleep(30)", "select 1"])
async def test_no_transaction_of_a_relay_outlives_a_lease(primary: AsyncEngine, doing: str) -> None:
    """L3: a relay may be paused anywhere in its turn; working or idle, the session is cut off."""
    connections = Primary(primary, SyncConfig(lease=timedelta(milliseconds=300)))
    connection = await connections.reserved()
    if doing != "select 1" and connection.get_server_version().major < 17:
        pytest.skip("transaction_timeout came with PostgreSQL 17; before, statement_timeout bounds this")
    started = asyncio.get_running_loop().time()

    async def turn() -> None:
        async with connection.transaction():
            await connection.execute(doing)
            await asyncio.sleep(1)
            await connection.execute("select 1")

    with pytest.raises(PRIMARY_FAILED):
        await turn()
    assert asyncio.get_running_loop().time() - started < 10
    connection.terminate()
