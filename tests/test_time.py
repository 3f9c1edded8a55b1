"""Time where it is odd: suspended relays, zones of servers, roles and sessions, days of twenty-three hours."""

from __future__ import annotations

import os
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
from tests.relay_process import RelayProcess, effects_in, told
from tests.relaying import change, dsn_of, execute, hold_of, manager_of, pending, rows, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

SUSPENSIONS = int(os.environ.get("OUTBOX_TEST_SUSPENSIONS", "20"))
ZONES = ["Pacific/Kiritimati", "America/St_Johns", "Europe/Berlin"]
LEVELS = {
    "database": "alter database {database} set timezone = '{zone}'",
    "role": "alter role {role} in database {database} set timezone = '{zone}'",
    "session": "select 1",
}
A_SECOND = timedelta(seconds=1)


async def nothing_owed(primary: AsyncEngine) -> bool:
    return await pending(primary) == 0


async def test_a_relay_that_is_suspended_again_and_again_spoils_nothing(
    primary: AsyncEngine, database: str, tmp_path: Path
) -> None:
    """T5: with work in hand, until another relay has done it; what it wakes with is fenced, each time.

    OUTBOX_TEST_SUSPENSIONS says how often; twenty times.
    """
    living = manager_of(primary, ScriptedSecondary("effects"), batch_size=5)
    await living.register()
    settings = {"lease": 0.3, "batch_size": 5, "prune_interval": 3600}
    async with effects_in(database) as effects:
        with RelayProcess(dsn_of(primary), effects.dsn, tmp_path / "suspended", **settings) as suspended:
            for round_ in range(SUSPENSIONS):
                await write(living, *(told(f"{round_}-{number}", f"wait:gate-{round_}") for number in range(10)))
                await eventually(lambda round_=round_: effects.asked(f"{round_}-9"))
                suspended.signal(signal.SIGSTOP)
                async with running(living.relay()):
                    await eventually(lambda: nothing_owed(primary))
                before = await rows(primary, "select * from outbox_attempt order by attempt_id")
                await effects.open_gate(f"gate-{round_}")
                suspended.signal(signal.SIGCONT)
                fenced = 2 * (round_ + 1)
                await eventually(lambda fenced=fenced: suspended.output.count("no longer ours") >= fenced)
                assert await rows(primary, "select * from outbox_attempt order by attempt_id") == before
            await write(living, change("after"))
            await eventually(lambda: effects.asked("after"))
            await eventually(lambda: nothing_owed(primary))
    assert await value(primary, "select sum(lost) from outbox_attempt") == 10 * SUSPENSIONS
    status = await living.backend_status("effects")
    assert (status.applied, status.stale, status.superseded, status.dead) == (10 * SUSPENSIONS + 1, 0, 0, 0)


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
