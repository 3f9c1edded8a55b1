"""Time where it is odd: suspended relays, zones of servers, roles and sessions, days of twenty-three hours."""

from __future__ import annotations

import random
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox import SyncManager
from outbox.errors import Unavailable
from outbox.secondaries.base import Retry
from tests.relay_process import Effects, RelayProcess, effects_in
from tests.relaying import change, dsn_of, execute, hold_of, manager_of, pending, rows, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

ZONES = ["Pacific/Kiritimati", "America/St_Johns", "Europe/Berlin"]
LEVELS = {
    "database": "alter database {database} set timezone = '{zone}'",
    "role": "alter role {role} in database {database} set timezone = '{zone}'",
    "session": "select 1",
}
A_SECOND = timedelta(seconds=1)
THREE_LEASES = "select clock_timestamp() > cast(:stopped as timestamptz) + interval '0.9 seconds'"


async def nothing_owed(primary: AsyncEngine) -> bool:
    return await pending(primary) == 0


async def test_a_relay_that_is_suspended_again_and_again_loses_and_spoils_nothing(
    primary: AsyncEngine, database: str, tmp_path: Path
) -> None:
    """T5: three leases each time, beside one that lives; what it wakes with is fenced, and older than what is there."""
    manager = manager_of(primary, ScriptedSecondary("effects"))
    await manager.register()
    settings = {"lease": 0.3, "batch_size": 5, "max_attempts": 1_000}
    async with effects_in(database) as effects:
        with (
            RelayProcess(dsn_of(primary), effects.dsn, tmp_path / "suspended", **settings) as suspended,
            RelayProcess(dsn_of(primary), effects.dsn, tmp_path / "living", **settings),
        ):
            for round_ in range(12):
                await write(manager, *(change(str(random.randrange(30)), round_) for _ in range(60)))
                before = await _asked_by(effects, suspended)
                await eventually(lambda before=before: _busy(primary, effects, suspended, before))
                suspended.signal(signal.SIGSTOP)
                stopped = await value(primary, "select clock_timestamp()")
                await eventually(lambda stopped=stopped: value(primary, THREE_LEASES, stopped=stopped))
                await write(manager, *(change(str(number), 100 + round_) for number in range(30)))
                suspended.signal(signal.SIGCONT)
            await eventually(lambda: nothing_owed(primary), timedelta(seconds=40))
        newest = "select resource_id, max(event_id) as position from outbox group by resource_id"
        held = await effects.held()
    assert held == {row["resource_id"]: row["position"] for row in await rows(primary, newest)}
    assert await value(primary, "select sum(lost) from outbox_attempt") > 0, "it was never suspended with work in hand"
    status = await manager.backend_status("effects")
    recorded = await value(primary, "select count(*) from outbox")
    assert status.applied + status.stale + status.superseded == recorded


async def _asked_by(effects: Effects, process: RelayProcess) -> int:
    return sum(row["process_id"] == process.pid for row in await effects.asked())


async def _busy(primary: AsyncEngine, effects: Effects, process: RelayProcess, before: int) -> bool:
    """It was asked something, or all is done: then it is suspended idle, which is a moment too."""
    return await _asked_by(effects, process) > before or await nothing_owed(primary)


async def in_zone(primary: AsyncEngine, level: str, zone: str) -> AsyncEngine:
    """An engine for whom the database, the role in it, or only its own sessions have this zone."""
    names = (await rows(primary, "select current_database() as database, current_user as role"))[0]
    await execute(primary, LEVELS[level].format(zone=zone, **names))
    given: dict[str, Any] = {"server_settings": {"timezone": zone}} if level == "session" else {}
    engine = create_async_engine(make_url(dsn_of(primary)), connect_args=given)
    assert await value(engine, "show timezone") == zone
    return engine


async def one(engine: AsyncEngine, **settings: Any) -> tuple[ScriptedSecondary, SyncManager]:
    secondary = ScriptedSecondary("search")
    manager = manager_of(engine, secondary, **settings)
    await manager.register()
    return secondary, manager


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("zone", ZONES)
async def test_no_zone_of_server_role_or_session_moves_anything(primary: AsyncEngine, level: str, zone: str) -> None:
    """T6: leases, schedules, the breaker, lag and retention are the same instants everywhere."""
    engine = await in_zone(primary, level, zone)
    secondary, manager = await one(engine, retry_initial=30, retry_max=30, keep_events=3600, prune_interval=0.05)
    secondary.script("1", Retry("busy", after=timedelta(seconds=30)))
    await write(manager, change("1"), change("2"))
    await manager.relay().drain()
    hold = await hold_of(engine, "1")
    assert hold is not None
    assert hold["next_attempt_at"] - hold["last_failed_at"] == timedelta(seconds=30)
    assert hold["next_attempt_at"].tzinfo is not None
    (attempt,) = await rows(engine, "select lease_until - started_at as lease from outbox_attempt")
    assert timedelta(0) < attempt["lease"] < 3 * A_SECOND
    status = await manager.backend_status("search")
    assert timedelta(0) < status.lag < 20 * A_SECOND
    assert timedelta(0) <= status.silence < 20 * A_SECOND
    age = "update outbox set created_at = created_at - interval '{}' where resource_id = '2'"
    async with running(manager.relay()):
        for minutes, left in ((59, 2), (2, 1)):
            await execute(engine, age.format(f"{minutes} minutes"))
            await eventually(lambda left=left: _is(engine, left))
    secondary.down = Unavailable("throttled", "", retry_after=timedelta(seconds=20))
    await write(manager, change("3"))
    assert await manager.relay().drain() == 1
    opened = "select breaker_until - clock_timestamp() from outbox_secondary where breaker = 'open'"
    assert 15 * A_SECOND < await value(engine, opened) <= 20 * A_SECOND
    await engine.dispose()


async def _is(engine: AsyncEngine, events: int) -> bool:
    return await value(engine, "select count(*) from outbox") == events
