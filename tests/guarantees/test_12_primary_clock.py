"""Promise 12: only the primary's clock decides leases, schedules, retention and lag."""

from __future__ import annotations

import ctypes.util
import re
import time
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

import outbox
from outbox import record
from outbox.secondaries.base import Rejected, Retry
from outbox.statement import Statement
from tests.relay_process import RelayProcess, effects_in, told
from tests.relaying import (
    change,
    claim_by_hand,
    claim_on,
    dsn_of,
    execute,
    manager_of,
    pending,
    raw,
    rows,
    running,
    value,
    write,
)
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

# What the relaying side is made of.
MODULES = (
    *("attempt", "breaker", "carrier", "claim", "dispatch", "lanes", "lease", "primary"),
    *("prune", "relay", "resume", "retry", "settle", "status", "turn", "wakeup"),
)
A_SECOND = timedelta(seconds=1)


def libfaketime() -> str:
    """The library that shifts a process's clock, where Debian and others put it."""
    found = [path for root in ("/usr/lib", "/usr/local/lib") for path in Path(root).rglob("libfaketimeMT.so.1")]
    if found:
        return str(found[0])
    if name := ctypes.util.find_library("faketimeMT"):
        return name
    pytest.skip("no libfaketime: install faketime (Debian: apt-get install faketime)")


@pytest.mark.parametrize("shift", ["+1d", "-1d", "+400d x10"])
async def test_a_relay_whose_clock_is_wrong_does_all_at_the_right_time(
    primary: AsyncEngine, database: str, tmp_path: Path, shift: str
) -> None:
    """T1: its leases last as long as they should, its retries are due when they should, it prunes nothing early."""
    shifted = {"LD_PRELOAD": libfaketime(), "FAKETIME": shift, "DONT_FAKE_MONOTONIC": "1"}
    manager = manager_of(primary, ScriptedSecondary("effects"), prune_interval=0.05)
    await manager.register()
    await write(manager, told("slow", "wait:gate"), told("fails", "retry"), *(change(str(n)) for n in range(5)))
    settings = {"retry_initial": 60, "retry_max": 60, "lease": 1, "prune_interval": 0.05, "keep_events": 3600}
    async with effects_in(database) as effects:
        with RelayProcess(dsn_of(primary), effects.dsn, tmp_path / "log", environment=shifted, **settings) as relay:
            await eventually(lambda: effects.asked("slow"))
            told_time = float(re.findall(r"running at (\S+)", relay.output)[0])
            assert abs(told_time - time.time()) > 80_000, "its clock was not wrong"
            async with running(manager.relay()):
                # One with the right clock stands by for several leases and sees nothing to take over.
                kept = "select lease_until > started_at + interval '2.2 s' from outbox_attempt order by attempt_id"
                await eventually(lambda: value(primary, kept))
                left = await value(primary, "select lease_until - now() from outbox_attempt order by attempt_id")
                assert timedelta(0) < left <= A_SECOND
            await effects.open_gate("gate")
            await eventually(lambda: _is(primary, 1))
            await write(manager, change("after"))
            await eventually(lambda: _is(primary, 1))
        assert len(await effects.held()) == 7
    (hold,) = await rows(primary, "select *, clock_timestamp() as now from outbox_hold")
    assert timedelta(0) < hold["next_attempt_at"] - hold["now"] + A_SECOND * 20 <= timedelta(seconds=80)
    assert abs(hold["now"] - hold["last_failed_at"]) < A_SECOND * 20
    assert await value(primary, "select count(*) from outbox") == 8, "nothing is old enough to be pruned"
    assert await value(primary, "select sum(lost) from outbox_attempt") == 0
    status = await manager.backend_status("effects")
    assert timedelta(0) < status.lag < A_SECOND * 30


async def _is(primary: AsyncEngine, owed: int) -> bool:
    return await pending(primary) == owed


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "America/St_Johns", "Europe/Berlin"])
async def test_the_time_zone_of_sessions_is_harmless(primary: AsyncEngine, zone: str) -> None:
    """T6: fourteen hours ahead, three and a half behind, daylight saving: leases, retries and lag are the same."""
    database = await value(primary, "select current_database()")
    await execute(primary, f"alter database {database} set timezone = '{zone}'")
    engine = create_async_engine(primary.url)
    secondary = ScriptedSecondary("search")
    manager = manager_of(engine, secondary, retry_initial=30, retry_max=30)
    await manager.register()
    assert await value(engine, "show timezone") == zone
    secondary.script("1", Retry("busy", after=timedelta(seconds=30)))
    await write(manager, change("1"), change("2"))
    await manager.relay().drain()
    (hold,) = await rows(engine, "select next_attempt_at - clock_timestamp() as wait from outbox_hold")
    assert timedelta(seconds=20) < hold["wait"] <= timedelta(seconds=30)
    (attempt,) = await rows(engine, "select lease_until - started_at as lease from outbox_attempt")
    assert timedelta(0) < attempt["lease"] < 3 * A_SECOND
    assert timedelta(0) < (await manager.backend_status("search")).lag < A_SECOND * 20
    await execute(engine, "update outbox_hold set next_attempt_at = clock_timestamp()")
    assert await manager.relay().drain() == 1
    await engine.dispose()


async def test_a_lease_made_late_in_a_transaction_is_not_born_expired(primary: AsyncEngine) -> None:
    """T4: statement and wall time count, and not when the transaction began."""
    manager = manager_of(primary, ScriptedSecondary("search"))
    await manager.register()
    await write(manager, change("1"))
    async with raw(primary) as connection, connection.transaction():
        await connection.execute("select pg_sleep(1.1)")
        attempt = await claim_on(connection, "search", lease=A_SECOND)
        assert attempt is not None
        left = await connection.fetchval("select lease_until - clock_timestamp() from outbox_attempt")
    assert left > timedelta(0)


async def test_an_event_is_as_old_as_its_recording_and_not_as_its_transaction(primary: AsyncEngine) -> None:
    """T4, T7: a long transaction does not make lag of the time before it recorded."""
    manager = manager_of(primary, ScriptedSecondary("search"))
    await manager.register()
    async with raw(primary) as connection, connection.transaction():
        await connection.execute("select pg_sleep(1.1)")
        await record(connection, change("1"))
        age = await connection.fetchval("select clock_timestamp() - created_at from outbox")
    assert timedelta(0) <= age < A_SECOND


async def test_lag_is_zero_when_nothing_is_owed_and_never_negative(primary: AsyncEngine) -> None:
    """T7: also for an event from the future, as after the database's clock was set back."""
    manager = manager_of(primary, ScriptedSecondary("search"))
    await manager.register()
    assert (await manager.backend_status("search")).lag == timedelta(0)
    await write(manager, change("1"))
    await execute(primary, "update outbox set created_at = clock_timestamp() + interval '1 hour'")
    status = await manager.backend_status("search")
    assert (status.pending, status.lag) == (1, timedelta(0))
    assert await manager.relay().drain() == 1
    assert (await manager.backend_status("search")).lag == timedelta(0)


async def test_lag_is_the_age_of_the_oldest_delivery_wherever_it_is(primary: AsyncEngine) -> None:
    """N2: waiting, in hand, failing, dead, and behind younger ones."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, retry_initial=600, retry_max=600)
    await manager.register()
    await write(manager, change("old", tenant="z"), change("young"))
    aged = "update outbox set created_at = clock_timestamp() - interval '1 hour' where resource_id = 'old'"
    await execute(primary, aged)

    async def lag_in_hours() -> float:
        return (await manager.backend_status("search")).lag / timedelta(hours=1)

    waiting = await lag_in_hours()
    assert await claim_by_hand(primary, "search")
    in_hand = await lag_in_hours()
    await execute(primary, "update outbox_attempt set lease_until = clock_timestamp() - interval '1 second'")
    await manager.relay().run_once("search")
    failing = await lag_in_hours()
    await execute(primary, "update outbox_hold set next_attempt_at = clock_timestamp()")
    secondary.script("old", Rejected("no"))
    await manager.relay().drain()
    dead = await lag_in_hours()
    assert [round(hours, 2) for hours in (waiting, in_hand, failing, dead)] == [1, 1, 1, 1]


async def test_what_is_not_due_by_the_databases_clock_is_left_alone(primary: AsyncEngine) -> None:
    """T1: a schedule an hour ahead waits, one just past is due."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary)
    await manager.register()
    secondary.script("1", Retry("busy"))
    await write(manager, change("1"))
    await manager.relay().run_once("search")
    await execute(primary, "update outbox_hold set next_attempt_at = clock_timestamp() + interval '1 hour'")
    assert await manager.relay().drain() == 0
    await execute(primary, "update outbox_hold set next_attempt_at = clock_timestamp()")
    assert await manager.relay().drain() == 1


@pytest.mark.parametrize("module", MODULES)
def test_no_statement_uses_the_transactions_start_and_no_code_the_process_clock(module: str) -> None:
    """T1, T4: a duration is all that this side ever adds to the database's time."""
    found = import_module(f"outbox.{module}")
    for name, statement in vars(found).items():
        if isinstance(statement, Statement):
            assert not re.search(
                r"(?i)\bnow\(|current_timestamp|localtimestamp|transaction_timestamp", statement.sql
            ), name
    source = (Path(outbox.__file__).parent / f"{module}.py").read_text()
    assert not re.findall(r"\btime\.time\(|\.now\(|utcnow|\.today\(|\btime_ns\(", source)
