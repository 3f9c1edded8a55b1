"""Guarantee 4, S5: a primary that was restored, cloned or failed over is recognised, and reconciling is demanded."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from outbox import SyncManager
from outbox.epoch import EPOCH, Vigil
from outbox.finding import Verdict
from outbox.lanes import HIGHEST
from outbox.migrate import migrate
from outbox.testing.postgres import EmbeddedPostgres
from tests.conftest import PostgresServer, new_database
from tests.forgetful import forgetful_server, log_held
from tests.relaying import change, execute, manager_of, own_server, rows, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

NOTE = """
insert into outbox_reconciliation (backend_id, repair, actor, reason, high_water, primary_count, secondary_count,
    missing, extra, stale, altered, in_flight, repaired, refused, started_at, tenant_id)
values ('search', true, '', '', 0, 1, 1, :missing, 0, 0, 0, 0, :repaired, 0, clock_timestamp(), :tenant)
"""


async def history(manager: SyncManager) -> Verdict:
    (found,) = [each.verdict for each in await manager.diagnose() if each.name == "history"]
    return found


async def epoch(engine: AsyncEngine) -> str:
    return str(await value(engine, EPOCH.on("public")))


async def recorded(engine: AsyncEngine) -> SyncManager:
    """A manager whose secondary was carried to, so that the registry knows the epoch."""
    manager = manager_of(engine, ScriptedSecondary("search"))
    await manager.register()
    await write(manager, change("one"))
    await manager.relay().drain()
    return manager


async def test_the_epoch_stays_as_long_as_the_primary_is_the_same(primary: AsyncEngine) -> None:
    """S5: no false alarm for what relays, writers and vacuum do."""
    manager = await recorded(primary)
    assert (await epoch(primary)).count("/") == 3
    for number in range(5):
        await write(manager, change(f"{number}"))
        await manager.relay().drain()
    await execute(primary, "analyze")
    assert await rows(primary, "select epoch, doubted_at from outbox_secondary") == [
        {"epoch": await epoch(primary), "doubted_at": None}
    ]
    assert await history(manager) is Verdict.OK
    await manager.aclose()


async def test_a_copy_of_the_database_is_another_epoch_though_positions_have_passed(
    postgres: PostgresServer, primary: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """S5: no secondary is ahead any more, and still it is said; reconciling everything is what ends it."""
    manager = await recorded(primary)
    await manager.aclose()
    await primary.dispose()
    with new_database(postgres, str(primary.url.database)) as name:
        copy = create_async_engine(postgres.dsn(name), poolclass=NullPool)
        manager = manager_of(copy, *(each.secondary for each in manager.registrations))
        for number in range(5):
            await write(manager, change(f"{number}"))
        assert await history(manager) is Verdict.WARNING
        with caplog.at_level(logging.WARNING, "outbox.relay"):
            assert await manager.relay().drain() == 5
        assert [record.outbox_error_code for record in caplog.records] == ["history"]
        assert await history(manager) is Verdict.WARNING
        assert await value(copy, "select epoch from outbox_secondary") == await epoch(copy)
        await _end(copy, manager)


async def _end(engine: AsyncEngine, manager: SyncManager) -> None:
    """Neither a part that was compared ends it, nor a comparison that left something."""
    for tenant, missing, repaired in (("default", 0, 0), (None, 2, 1)):
        await execute(engine, NOTE, tenant=tenant, missing=missing, repaired=repaired)
        assert await history(manager) is Verdict.WARNING
    await execute(engine, NOTE, tenant=None, missing=2, repaired=2)
    assert await history(manager) is Verdict.OK
    await manager.aclose()
    await engine.dispose()


async def test_a_promoted_standby_is_another_epoch() -> None:
    """S5: after a failover it is not known whether the standby had everything."""
    with own_server() as server:
        engine = create_async_engine(server.dsn(), poolclass=NullPool)
        await migrate(engine)
        manager = await recorded(engine)
        before = await epoch(engine)
        server.stop()
        (server.directory / "standby.signal").touch()
        server.start()
        await execute_outside(engine, "select pg_promote()")
        await eventually(lambda: epoch(engine))
        assert await epoch(engine) != before
        assert await history(manager) is Verdict.WARNING
        await manager.aclose()
        await engine.dispose()


async def execute_outside(engine: AsyncEngine, sql: str) -> None:
    async with engine.connect() as connection:
        await connection.exec_driver_sql(sql)


async def test_a_data_directory_put_back_is_found_by_what_the_secondary_holds(directory: Path) -> None:
    """C4: nothing in the primary says it, as all that could say it was put back too."""
    with EmbeddedPostgres(directory / "data") as server:
        engine = create_async_engine(server.dsn(), poolclass=NullPool)
        await migrate(engine)
        manager = await recorded(engine)
        before = await epoch(engine)
        server.stop()
        shutil.copytree(server.directory, directory / "backup")
        server.start()
        for number in range(40):
            await write(manager, change(f"{number}"))
        await manager.relay().drain()
        server.stop()
        _put_back(directory / "backup", server.directory)
        server.start()
        await write(manager, change("1", 2))
        await manager.relay().drain()
        assert await epoch(engine) == before
        assert await value(engine, "select beyond from outbox_secondary") == 41
        assert (await manager.move_past()).after == 42
        assert await history(manager) is Verdict.WARNING
        await manager.aclose()
        await engine.dispose()


def _put_back(backup: Path, place: Path) -> None:
    """Replace a data directory by its backup, which belongs to the server's account as it did."""
    owner = place.stat()
    shutil.rmtree(place)
    shutil.copytree(backup, place)
    for path in (place, *place.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid)


async def test_a_relay_that_runs_sees_that_positions_are_given_again(primary: AsyncEngine) -> None:
    """S5: restored in place, without a connection lost, while it had nothing to do."""
    manager = await recorded(primary)
    (secondary,) = [each.secondary for each in manager.registrations]
    assert isinstance(secondary, ScriptedSecondary)
    async with running(manager.relay()):
        for number in range(10):
            await write(manager, change(f"{number}"))
        await eventually(lambda: len(secondary.sent) == 11)
        for _ in range(3):
            # Each time it says that it looked, it has also looked how far positions were.
            seen = await value(primary, "select looked_at from outbox_secondary")
            await eventually(lambda seen=seen: value(primary, "select looked_at > :at from outbox_secondary", at=seen))
        await execute(primary, "delete from outbox")
        await execute(primary, "select setval('outbox_event_id_seq', 3)")
        await eventually(lambda: value(primary, "select doubted_at from outbox_secondary"))
        await write(manager, change("1", 1))
        await eventually(lambda: value(primary, "select beyond from outbox_secondary"))
    assert secondary.held["default", "Thing", "1"].content == '{"value":0}'
    await manager.aclose()


async def test_positions_that_a_crash_took_with_it_are_no_history_that_went_back() -> None:
    """S5: drawn, seen by a relay, never committed: a crash may give them again, and nobody ever had them."""
    with forgetful_server() as server:
        engine = create_async_engine(server.dsn(), poolclass=NullPool)
        await migrate(engine)
        manager = await recorded(engine)
        vigil = Vigil("search")
        async with connected(server) as connection, connected(server) as writer:
            with log_held(server) as crash:
                await writer.transaction().start()
                await writer.execute("select nextval('outbox_event_id_seq') from generate_series(1, 100)")
                assert not await vigil.went_back(connection, "public")
                seen = await connection.fetchval(HIGHEST.on("public"))
                crash()
        server.start()
        async with connected(server) as connection:
            assert await connection.fetchval(HIGHEST.on("public")) < seen
            assert not await vigil.went_back(connection, "public")
            assert await connection.fetchval("select doubted_at from outbox_secondary") is None
        assert await history(manager) is Verdict.OK
        await manager.aclose()
        await engine.dispose()


@asynccontextmanager
async def connected(server: EmbeddedPostgres) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A plain connection, which a crash of the server may end first."""
    connection = await asyncpg.connect(server.dsn(driver="postgresql"))
    try:
        yield connection
    finally:
        connection.terminate()


async def test_a_role_that_may_not_see_the_epoch_carries_all_the_same(primary: AsyncEngine) -> None:
    """S5: then only the positions tell, and the doctor says that it does not know."""
    name = f"plain_{primary.url.database}"
    await execute(primary, "revoke execute on function pg_control_system() from public")
    await execute(primary, f"create role {name} login")
    await execute(primary, f"grant all on all tables in schema public to {name}")
    await execute(primary, f"grant all on all sequences in schema public to {name}")
    engine = create_async_engine(primary.url.set(username=name), poolclass=NullPool)
    manager = await recorded(engine)
    (secondary,) = [each.secondary for each in manager.registrations]
    assert isinstance(secondary, ScriptedSecondary)
    assert len(secondary.held) == 1
    assert await history(manager) is Verdict.UNKNOWN
    await manager.aclose()
    await engine.dispose()
    await execute(primary, f"drop owned by {name}")
    await execute(primary, f"drop role {name}")
