"""Health: nothing is green that is not, every red has its reason, and what is mended turns green again."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox import BackendSyncStatus, Registration, Rejected, Retry, SettingsError, SyncConfig, SyncManager, Unavailable
from outbox.health import Health
from outbox.migrate import migrate
from outbox.status import LAG, reasons_of
from tests.relay_process import RelayProcess, effects_in
from tests.relaying import change, dsn_of, execute, manager_of, own_server, quick, rows, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

SOON = {"unhealthy_after_silence": 0.6}
# Evidence of attempts alone: nothing else may turn these red on a slow machine.
PATIENT: dict[str, Any] = {"unhealthy_lag": None, "unhealthy_after_silence": None}
STATUS = BackendSyncStatus(
    "search", "live", *[0] * 4, timedelta(0), "closed", *[None] * 3, *[0] * 7, None, timedelta(0), 0.0
)


async def one(engine: AsyncEngine, **settings: Any) -> tuple[ScriptedSecondary, SyncManager]:
    secondary = ScriptedSecondary("search")
    manager = manager_of(engine, secondary, **settings)
    await manager.register()
    return secondary, manager


async def reasons(manager: SyncManager) -> tuple[str, ...]:
    return (await manager.backend_status("search")).reasons


def is_green(manager: SyncManager) -> Callable[[], Awaitable[bool]]:
    return manager.is_healthy


def is_red(manager: SyncManager, *words: str) -> Callable[[], Awaitable[bool]]:
    """Whether it is unhealthy for exactly these kinds of reasons."""

    async def red() -> bool:
        health = await manager.health()
        assert health.ok == (health.reasons == ())
        return [reason.split()[1].strip(":") for reason in health.progress.reasons] == list(words)

    return red


async def carry(manager: SyncManager, *names: str) -> tuple[str, ...]:
    """Write each, and carry it in an attempt of its own; return what is wrong then."""
    relay = manager.relay()
    for name in names:
        await write(manager, change(name))
        await relay.drain()
    return await reasons(manager)


# By the database alone


async def test_rejecting_is_unhealthy_and_healthy_again_after_enough_successes(primary: AsyncEngine) -> None:
    """SEED check 11, D36, D37: who rejects quickly is not healthy, and who was healthy once does not stay so."""
    secondary, manager = await one(primary, **PATIENT)
    assert await carry(manager, "well") == ()
    for name in ("1", "2", "3"):
        secondary.always(name, Rejected("malformed"))
    assert await carry(manager, "1", "2") == ("dead keys: 2",)
    assert await carry(manager, "3") == ("dead keys: 3", "attempts: the last 3 failed (malformed)")
    assert not await manager.is_healthy()
    for name in ("1", "2", "3"):
        secondary.heal(name)
    again = "attempts failed (malformed), and no 2 in a row succeeded since"
    assert await carry(manager, "1") == ("dead keys: 2", again)
    # The second success, and what is still dead says so.
    assert await carry(manager, "2") == ("dead keys: 1",)
    assert await carry(manager, "3") == ()
    assert await manager.is_healthy()


async def test_a_failure_in_between_starts_the_successes_anew(primary: AsyncEngine) -> None:
    """D36: recovers after N successes in a row; here thresholds of their own."""
    secondary, manager = await one(primary, **PATIENT, failure_threshold=2, success_threshold=3)
    secondary.script("1", Rejected("no"), Rejected("no"), None, None, Rejected("no"), None, None, None)
    failed = "attempts failed (no), and no 3 in a row succeeded since"
    assert await carry(manager, "1") == ("dead keys: 1",)
    assert await carry(manager, "1") == ("dead keys: 1", "attempts: the last 2 failed (no)")
    assert await carry(manager, "1", "1") == (failed,)
    assert await carry(manager, "1") == ("dead keys: 1", failed)
    assert await carry(manager, "1", "1") == (failed,)
    assert await carry(manager, "1") == ()


async def test_every_process_says_the_same_also_right_after_a_restart(primary: AsyncEngine) -> None:
    """D49: from the database, wall-clock times and all; D46: attempts as they were made."""
    secondary, manager = await one(primary, **PATIENT, max_attempts=3)
    secondary.always("1", Retry("busy"))
    await write(manager, change("1"))
    relay = manager.relay()
    await eventually(lambda: _dead(manager, relay))
    said = await manager.backend_status("search")
    assert said.reasons == ("dead keys: 1", "attempts: the last 3 failed (busy)")
    assert (await manager.failures())[0].attempts == 3
    fresh = create_async_engine(primary.url)
    again = await SyncManager(fresh, config=quick(**PATIENT)).backend_status("search")
    await fresh.dispose()
    ages = {"lag": timedelta(0), "silence": timedelta(0)}
    assert msgspec.structs.replace(again, **ages) == msgspec.structs.replace(said, **ages)


async def _dead(manager: SyncManager, relay: Any) -> bool:
    await relay.drain()
    return (await manager.backend_status("search")).dead == 1


async def test_what_got_something_through_is_no_failure_and_a_stop_is_neither(primary: AsyncEngine) -> None:
    """One key that fails among others is that key's trouble; a hand-back says nothing about the secondary."""
    secondary, manager = await one(primary, **PATIENT, failure_threshold=1, success_threshold=1)
    secondary.always("bad", Rejected("no"))
    await write(manager, change("bad"), change("good"))
    await manager.relay().drain()
    assert await reasons(manager) == ("dead keys: 1",)
    secondary.hang()
    async with running(manager.relay()):
        await write(manager, change("given back"))
        await eventually(lambda: bool(secondary.running))
    assert await value(primary, "select released from outbox_attempt order by attempt_id desc limit 1") == 1
    assert await reasons(manager) == ("dead keys: 1",)
    secondary.release()


def test_runs_of_attempts_decide_as_a_machine_that_saw_them_all() -> None:
    """D36: starts healthy, fails after F failures in a row, recovers after S successes; pytest prints the seed."""
    for _ in range(3_000):
        failure, success = random.randint(1, 4), random.randint(1, 4)
        config = quick(failure_threshold=failure, success_threshold=success)
        healthy, run, last = True, 0, None
        endings = random.choices([None, "no"], k=random.randint(0, 30))
        for ending in endings:
            run, last = (run + 1 if ending == last else 1), ending
            if run >= (success if ending is None else failure):
                healthy = ending is None
        assert (reasons_of(STATUS, endings[::-1], config) == ()) == healthy, endings


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lag": timedelta(seconds=31)}, ("lag 31 s is above 30 s",)),
        ({"lag": timedelta(seconds=30)}, ()),
        ({"pending": 100_001}, ("pending 100,001 is above 100,000",)),
        ({"pending": 100_000, "in_flight": 400, "failing": 3}, ()),
        ({"dead": 4}, ("dead keys: 4",)),
        ({"breaker": "open"}, ("breaker open",)),
        ({"breaker": "half_open"}, ("breaker half_open",)),
        ({"silence": timedelta(seconds=40)}, ("silence: no relay has looked for 40 s",)),
        ({"silence": timedelta(seconds=30)}, ()),
        # To be paused, or not yet live, is to fall behind; what else is wrong is wrong all the same.
        ({"status": "paused", "lag": timedelta(days=1), "pending": 10**7}, ()),
        ({"status": "shadow", "lag": timedelta(days=1), "pending": 10**7}, ()),
        ({"status": "paused", "dead": 1, "breaker": "open"}, ("dead keys: 1", "breaker open")),
        # D52: one that was removed hinders nobody.
        ({"status": "removed", "dead": 1, "breaker": "open", "lag": timedelta(1), "silence": timedelta(1)}, ()),
    ],
)
def test_each_limit_has_its_reason(changes: dict[str, Any], expected: tuple[str, ...]) -> None:
    """D37, D38, D39, N3: age, count, dead, breaker and silence, each by a limit of its own."""
    status = msgspec.structs.replace(STATUS, **changes)
    assert reasons_of(status, [], SyncConfig()) == expected


def test_limits_can_be_set_and_switched_off() -> None:
    """D38, D39: each has its own setting."""
    late = msgspec.structs.replace(STATUS, lag=timedelta(hours=1), pending=10**9, silence=timedelta(hours=1))
    off = {"unhealthy_lag": "off", "unhealthy_pending": "off", "unhealthy_after_silence": "off"}
    assert reasons_of(late, [], SyncConfig(**off)) == ()
    tight = SyncConfig(unhealthy_lag=1, unhealthy_pending=1, unhealthy_after_silence=1)
    assert [reason.split()[0] for reason in reasons_of(late, [], tight)] == ["lag", "pending", "silence:"]
    with pytest.raises(SettingsError, match="unhealthy_after_silence"):
        SyncConfig(unhealthy_after_silence=1, poll_interval=0.5)
    with pytest.raises(SettingsError, match="unhealthy_pending"):
        SyncConfig(unhealthy_pending=0)


async def test_what_is_in_flight_is_owed_and_counted_by_resource(primary: AsyncEngine) -> None:
    """D43, D50, D51: a batch counts by what is in it; errors, times and throughput are there to be seen."""
    secondary, manager = await one(primary, unhealthy_lag=None, unhealthy_pending=4)
    secondary.script("5", Retry("busy"), None)
    secondary.hang()
    async with running(manager.relay()):
        await write(manager, *(change(str(number)) for number in range(1, 6)))
        await eventually(lambda: bool(secondary.running))
        status = await manager.backend_status("search")
        assert (status.pending, status.in_flight, status.total_synced) == (5, 5, 0)
        assert status.reasons == ("pending 5 is above 4",)
        secondary.release()
        await eventually(is_green(manager))
        await eventually(lambda: _synced(manager, 5))
    status = await manager.backend_status("search")
    assert (status.pending, status.total_errors, status.last_error_code) == (0, 1, "busy")
    assert status.throughput == pytest.approx(5 / 60)
    assert status.last_success_at is not None
    assert status.last_error_at is not None
    assert status.last_error_at <= status.last_success_at


async def _synced(manager: SyncManager, expected: int) -> bool:
    return (await manager.backend_status("search")).total_synced == expected


async def test_what_is_not_there_is_not_healthy(primary: AsyncEngine) -> None:
    """D44: no secondary at all, or none of those that the configuration names."""
    assert (await SyncManager(primary).health()).progress.reasons == ("no secondary is registered",)
    manager = manager_of(primary, ScriptedSecondary("search"), ScriptedSecondary("cache"))
    assert (await manager.health()).reasons == ("search: not registered", "cache: not registered")
    await manager_of(primary, ScriptedSecondary("search")).register()
    assert (await manager.health()).reasons == ("cache: not registered",)
    await manager.register()
    health = await manager.health()
    assert health.ok
    assert [each.backend_id for each in health.secondaries] == ["cache", "search"]


async def test_one_that_was_removed_hinders_nobody(primary: AsyncEngine) -> None:
    """D52: whatever is still owed to it."""
    secondary, manager = await one(primary)
    secondary.always("1", Rejected("no"))
    await carry(manager, "1")
    assert not await manager.is_healthy()
    await execute(primary, "update outbox_secondary set status = 'removed'")
    assert await manager.is_healthy()


# Progress


async def test_no_relay_turns_it_red_and_the_next_one_green_at_once(primary: AsyncEngine) -> None:
    """N3: with nothing due; a paused one is looked after too, and a fresh one has its time."""
    _, manager = await one(primary, **SOON)
    assert await manager.is_healthy()
    await eventually(is_red(manager, "silence"))
    await execute(primary, "update outbox_secondary set status = 'paused'")
    # So rarely that only the first look can be what counts.
    patient = manager_of(primary, ScriptedSecondary("search"), prune_interval=3600, unhealthy_after_silence=3600)
    async with running(patient.relay()):
        await eventually(is_green(manager))
    await eventually(is_red(manager, "silence"))
    async with running(manager.relay(), manager.relay()):
        await eventually(is_green(manager))
        since = await value(primary, "select looked_at from outbox_secondary")
        await eventually(lambda: _looked_after(primary, since))
        assert await manager.is_healthy()
    await manager.relay().drain()
    assert await manager.is_healthy()


async def _looked_after(primary: AsyncEngine, since: Any) -> bool:
    later = "select looked_at > cast(:since as timestamptz) + interval '1 second' from outbox_secondary"
    return bool(await value(primary, later, since=since))


async def test_a_loop_that_stands_still_turns_red_whatever_else_goes_on(primary: AsyncEngine) -> None:
    """N3: heartbeats and housekeeping of the very same relay do not hide it."""
    secondary, manager = await one(primary, **SOON, attempts_in_flight=1, unhealthy_lag=None)
    secondary.hang()
    async with running(manager.relay()):
        await write(manager, change("1"))
        await eventually(is_red(manager, "silence"))
        before = await value(primary, "select lease_until from outbox_attempt")
        await eventually(lambda: _renewed(primary, before))
        assert await is_red(manager, "silence")()
        secondary.release()
        await eventually(is_green(manager))


async def _renewed(primary: AsyncEngine, before: Any) -> bool:
    return bool(await value(primary, "select lease_until from outbox_attempt") > before)


async def test_a_look_that_fails_is_no_look(primary: AsyncEngine) -> None:
    """N3: a relay that can take its turn but not claim is as good as none."""
    _, manager = await one(primary, **SOON, unhealthy_lag=None)
    async with running(manager.relay()):
        await eventually(is_green(manager))
        await execute(primary, "alter table outbox_attempt add constraint none check (finished_at is not null)")
        await write(manager, change("1"))
        await eventually(is_red(manager, "silence"))
        await execute(primary, "alter table outbox_attempt drop constraint none")
        await eventually(is_green(manager))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_relays_that_are_killed_or_frozen_turn_it_red(
    primary: AsyncEngine, database: str, tmp_path: Path, how: signal.Signals
) -> None:
    """N3: nothing of theirs says goodbye."""
    manager = manager_of(primary, **SOON)
    async with effects_in(database) as effects:
        with RelayProcess(dsn_of(primary), effects.dsn, tmp_path / "log", **SOON) as process:
            await eventually(is_green(manager))
            process.signal(how)
            await eventually(is_red(manager, "silence"))
            if how == signal.SIGSTOP:
                process.signal(signal.SIGCONT)
                await eventually(is_green(manager))
        with RelayProcess(dsn_of(primary), effects.dsn, tmp_path / "log", **SOON):
            await eventually(is_green(manager))


async def test_an_outage_turns_it_red_and_its_end_green(primary: AsyncEngine) -> None:
    """N3: breaker open; two batches that get through close it and are success enough."""
    secondary, manager = await one(primary, **PATIENT)
    secondary.down = Unavailable("refused", "")
    async with running(manager.relay()):
        await write(manager, *(change(str(number)) for number in range(10)))
        await eventually(is_red(manager, "breaker", "attempts"))
        secondary.down = None
        await eventually(is_green(manager))


async def test_lag_turns_it_red_and_catching_up_green(primary: AsyncEngine) -> None:
    """N3, D38: by the age of the oldest that is owed."""
    _, manager = await one(primary, unhealthy_lag=20)
    await write(manager, change("1"))
    assert await manager.is_healthy()
    await execute(primary, "update outbox set created_at = created_at - interval '1 minute'")
    assert await is_red(manager, "lag")()
    await manager.relay().drain()
    assert await manager.is_healthy()


async def test_the_latest_attempts_are_read_by_index_however_many_there_are(primary: AsyncEngine) -> None:
    """N5: what is new here does not grow with the history."""
    _, manager = await one(primary)
    history = """
    insert into outbox_attempt (backend_id, relay_id, event_ids, key_hashes, lease_until, finished_at, applied)
    select 'search', gen_random_uuid(), '{}', '{}', now(), now(), 10 from generate_series(1, 20000)
    """
    await execute(primary, history)
    await execute(primary, "update outbox_secondary set folded_through = (select max(attempt_id) from outbox_attempt)")
    async with primary.connect() as connection:
        autocommit = await connection.execution_options(isolation_level="AUTOCOMMIT")
        await autocommit.exec_driver_sql("vacuum analyze outbox_attempt")
    plan = [row["QUERY PLAN"] for row in await rows(primary, "explain " + LAG.on("public"))]
    latest = next(at for at, line in enumerate(plan) if "Index Scan Backward using outbox_attempt_pkey" in line)
    assert "Limit" in plan[latest - 1], plan
    # A full window that is younger than a minute tells by its own length.
    assert (await manager.backend_status("search")).throughput > 1_000 / 60


# The primary and the process


async def test_tables_of_another_version_are_red(primary: AsyncEngine) -> None:
    """N3: schema mismatch, told with what to do about it."""
    _, manager = await one(primary)
    await execute(primary, "alter table outbox_hold rename column error to problem")
    health = await manager.health()
    assert (health.process.ok, health.database.ok, health.progress.ok) == (True, False, False)
    assert "run `outbox migrate`" in health.database.reasons[0]
    await execute(primary, "alter table outbox_hold rename column problem to error")
    assert await manager.is_healthy()


async def test_missing_tables_are_red_and_a_relay_that_ended_by_itself_is_missed(database: str) -> None:
    """N3: the process is red until a relay runs again, the database until it has its tables."""
    engine = create_async_engine(database)
    manager = manager_of(engine, ScriptedSecondary("search"))
    with pytest.raises(Exception, match="outbox_secondary"):
        await manager.relay().run()
    health = await manager.health()
    assert health.process.reasons == ("relays of this process that ended by themselves: 1",)
    assert "has no outbox tables" in health.database.reasons[0]
    await migrate(engine)
    async with running(manager.relay()):
        await eventually(is_green(manager))
    assert (await manager.health()).process.ok
    cancelled = asyncio.create_task(manager.relay().run())
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait({cancelled})
    assert (await manager.health()).process.ok
    await engine.dispose()


async def test_a_loop_that_is_blocked_is_red(primary: AsyncEngine) -> None:
    """N3: a process that cannot answer in time says so when it can."""
    _, manager = await one(primary)
    # What a call into slow code does to everybody else of the loop.
    asyncio.get_running_loop().call_soon(time.sleep, 1.2)
    assert "event loop" in (await manager.health()).process.reasons[0]
    assert await manager.is_healthy()


async def test_a_primary_that_never_answers_is_red_in_bounded_time() -> None:
    """N3: a hole in the network takes what is sent; the refusal of a port that is closed is quicker."""
    holes: list[Any] = []
    server = await asyncio.start_server(lambda *streams: holes.append(streams), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    engine = create_async_engine(f"postgresql+asyncpg://nobody@127.0.0.1:{port}/none")
    manager = manager_of(engine, ScriptedSecondary("search"), health_timeout=0.3)
    found = await asyncio.wait_for(asyncio.gather(manager.health(), manager.health()), timeout=10)
    for health in found:
        assert _unknown(health) == "database: no answer within 0.3 s"
    assert len(holes) == 1
    server.close()
    for _, writer in holes:
        writer.close()
    await eventually(lambda: _refused(manager))
    await engine.dispose()


async def _refused(manager: SyncManager) -> bool:
    return _unknown(await manager.health()) == "database: failed (ConnectionRefusedError)"


def _unknown(health: Health) -> str:
    assert (health.process.ok, health.progress.ok, health.ok, health.secondaries) == (True, False, False, ())
    [reason] = health.database.reasons
    return reason


async def test_a_server_that_hangs_or_is_gone_is_red_until_it_is_back() -> None:
    """N3: on a connection of the pool that was good a moment ago."""
    with own_server() as server:
        engine = create_async_engine(server.dsn())
        await migrate(engine)
        _, manager = await one(engine, health_timeout=0.5)
        assert await manager.is_healthy()
        process = await value(engine, "select pg_backend_pid()")
        os.kill(process, signal.SIGSTOP)
        try:
            assert _unknown(await asyncio.wait_for(manager.health(), 10)) == "database: no answer within 0.5 s"
        finally:
            os.kill(process, signal.SIGCONT)
        await eventually(is_green(manager))
        await asyncio.to_thread(server.stop)
        assert _unknown(await asyncio.wait_for(manager.health(), 10)).startswith("database: ")
        await asyncio.to_thread(server.start)
        await eventually(is_green(manager))
        await engine.dispose()


async def test_no_reason_tells_an_address_or_a_password(primary: AsyncEngine) -> None:
    """Promise 14: a code, and never a driver's own words."""
    url = make_url(dsn_of(primary)).set(username="nobody-has-this-name", password="sesame", database="gone-1")
    engine = create_async_engine(url)
    health = await SyncManager(engine, [Registration(ScriptedSecondary("search"))]).health()
    assert not health.ok
    assert not any(word in repr(health) for word in ("sesame", "nobody-has", "gone-1"))
    await engine.dispose()
