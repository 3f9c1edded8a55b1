"""Promise 12: with the primary's own clock set forward or back nothing is lost, and nothing waits for the old time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from outbox import SyncManager
from outbox.errors import Unavailable
from outbox.migrate import migrate
from outbox.secondaries.base import Retry
from outbox.testing.postgres import EmbeddedPostgres
from tests.guarantees.test_12_primary_clock import libfaketime
from tests.relaying import change, claim_by_hand, execute, hold_of, manager_of, pending, rows, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

AN_HOUR = 3600
SETTINGS: dict[str, Any] = {
    "lease": 1,
    "retry_initial": 2,
    "retry_max": 2,
    "breaker_threshold": 1,
    "breaker_initial": 2,
    "breaker_max": 2,
}
# Far more than the longest lease and schedule of these settings, far less than an hour.
SOON = timedelta(seconds=30)


class SetPostgres(EmbeddedPostgres):
    """A server whose clock is set while it runs."""

    def __init__(self, clock: Path) -> None:
        super().__init__(settings={"fsync": "off"})
        self._clock = clock
        self.set_clock(0)

    def set_clock(self, seconds: int) -> None:
        """Be this far ahead of the true time from now on."""
        new = self._clock.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.chmod(0o644)
        # At once: a file that is being written would be read half.
        new.replace(self._clock)

    def _command(self) -> Sequence[str | Path]:
        faked = {
            "LD_PRELOAD": libfaketime(),
            "FAKETIME_TIMESTAMP_FILE": str(self._clock),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }
        return ["/usr/bin/env", *(f"{name}={setting}" for name, setting in faked.items()), *super()._command()]


@pytest.fixture
def server(directory: Path) -> Iterator[SetPostgres]:
    libfaketime()
    with SetPostgres(directory / "clock") as running_server:
        yield running_server


@pytest.fixture
async def engine(server: SetPostgres) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(server.dsn(), poolclass=NullPool)
    await migrate(engine)
    yield engine
    await engine.dispose()


async def ahead(engine: AsyncEngine) -> float:
    """How many seconds the server's clock is ahead of ours."""
    told: datetime = await value(engine, "select clock_timestamp()")
    return (told - datetime.now(UTC)).total_seconds()


async def set_clock(server: SetPostgres, engine: AsyncEngine, seconds: int) -> None:
    server.set_clock(seconds)
    assert abs(await ahead(engine) - seconds) < 10, "the clock was not set"


async def nothing_owed(engine: AsyncEngine) -> bool:
    return await pending(engine) == 0


async def one(engine: AsyncEngine) -> tuple[ScriptedSecondary, SyncManager]:
    secondary = ScriptedSecondary("search")
    manager = manager_of(engine, secondary, **SETTINGS)
    await manager.register()
    return secondary, manager


async def look_once(manager: SyncManager) -> None:
    """Have a relay look at what is due; it says so in the registry, as every relay does every few seconds."""
    assert await manager.relay().run_once("search") == 0


async def test_a_clock_set_forward_costs_duplicates_at_most(server: SetPostgres, engine: AsyncEngine) -> None:
    """T2: leases run out early, so what is in hand is sent again; all of it arrives, and nothing goes backwards."""
    secondary, manager = await one(engine)
    other = manager_of(engine, secondary, **SETTINGS)
    secondary.hang()
    async with running(manager.relay(), other.relay()):
        await write(manager, *(change(str(number), 1) for number in range(20)))
        await eventually(lambda: secondary.running)
        await set_clock(server, engine, AN_HOUR)
        await write(manager, *(change(str(number), 2) for number in range(20)))
        await eventually(lambda: len(secondary.calls) > 1, SOON)
        secondary.release()
        await eventually(lambda: nothing_owed(engine), SOON)
    newest = {row["resource_id"]: row["position"] for row in await rows(engine, NEWEST)}
    assert {event.resource_id: event.position for event in secondary.held.values()} == newest
    for name in newest:
        kept = [event.position or 0 for event in secondary.history if event.resource_id == name]
        assert kept == sorted(kept)
    assert await value(engine, "select coalesce(max(attempts), 0) from outbox_hold") == 0


NEWEST = "select resource_id, max(event_id) as position from outbox group by resource_id"


async def test_a_clock_set_back_keeps_no_lease_of_a_dead_relay(server: SetPostgres, engine: AsyncEngine) -> None:
    """T3: the lease of whoever vanished would end in an hour; it has a second at most."""
    secondary, manager = await one(engine)
    await set_clock(server, engine, AN_HOUR)
    await look_once(manager)
    await write(manager, change("1"))
    assert await claim_by_hand(engine, "search", lease=timedelta(seconds=1))
    await set_clock(server, engine, 0)
    async with running(manager.relay()):
        await eventually(lambda: nothing_owed(engine), SOON)
    assert secondary.content_of("Thing", "1") == '{"value":0}'
    assert await value(engine, "select sum(lost) from outbox_attempt") == 1


async def test_a_clock_set_back_takes_nothing_from_a_relay_that_lives(server: SetPostgres, engine: AsyncEngine) -> None:
    """T3: what it has in hand it keeps, by the heartbeats it made before and after."""
    secondary, manager = await one(engine)
    other = manager_of(engine, secondary, **SETTINGS)
    await set_clock(server, engine, AN_HOUR)
    secondary.hang()
    async with running(manager.relay(), other.relay()):
        await write(manager, change("1"))
        await eventually(lambda: secondary.running)
        await set_clock(server, engine, 0)
        renewed = "select lease_until < clock_timestamp() + interval '5 seconds' from outbox_attempt"
        await eventually(lambda: value(engine, renewed))
        last = await value(engine, "select lease_until from outbox_attempt")
        kept = "select lease_until > cast(:last as timestamptz) + interval '2 seconds' from outbox_attempt"
        await eventually(lambda: value(engine, kept, last=last))
        secondary.release()
        await eventually(lambda: nothing_owed(engine), SOON)
    assert len(secondary.sent) == 1
    assert await value(engine, "select sum(lost) from outbox_attempt") == 0


async def test_a_clock_set_back_delays_no_retry(server: SetPostgres, engine: AsyncEngine) -> None:
    """T3: failing and handed back; each waits as long as it had to, and not an hour more."""
    secondary, manager = await one(engine)
    await set_clock(server, engine, AN_HOUR)
    await write(manager, change("failing"), change("released"))
    secondary.script("failing", Retry("busy"))
    await manager.relay().run_once("search")
    await write(manager, change("released", 2))
    secondary.hang()
    carrying = asyncio.create_task(manager.relay().run_once("search"))
    await eventually(lambda: secondary.running)
    carrying.cancel()
    await asyncio.wait({carrying})
    hold = await hold_of(engine, "released")
    assert hold is not None
    assert hold["state"] == "released"
    await set_clock(server, engine, 0)
    secondary.release()
    async with running(manager.relay()):
        await eventually(lambda: nothing_owed(engine), SOON)
    assert await value(engine, "select sum(retried) from outbox_attempt") == 1


async def test_a_clock_set_back_keeps_no_breaker_open(server: SetPostgres, engine: AsyncEngine) -> None:
    """T3: the next probe comes when it should, and no event pays for it."""
    secondary, manager = await one(engine)
    await set_clock(server, engine, AN_HOUR)
    secondary.down = Unavailable("refused", "")
    await write(manager, change("1"))
    await manager.relay().run_once("search")
    assert await value(engine, "select breaker from outbox_secondary") == "open"
    await set_clock(server, engine, 0)
    secondary.down = None
    async with running(manager.relay()):
        await eventually(lambda: nothing_owed(engine), SOON)
    assert await value(engine, "select sum(retried + lost) from outbox_attempt") == 0


COMPARED = """
    insert into outbox_reconciliation
        (backend_id, repair, actor, reason, high_water, primary_count, secondary_count, missing, extra, stale, altered,
         in_flight, repaired, refused, started_at)
    values ('search', false, 'test', 'test', 0, 1, 1, :missing, 0, 0, 0, 0, 0, 0, clock_timestamp())
"""
TO_COME = """
    select array(select name from (values
        ('doubted', doubted_at), ('proof', proof_at), ('registered', registered_at),
        ('begun', (select max(started_at) from outbox_reconciliation)),
        ('ended', (select max(finished_at) from outbox_reconciliation))
    ) as told (name, at) where at > clock_timestamp()) from outbox_secondary
"""
DOUBT = "update outbox_secondary set doubted_at = clock_timestamp(), proof_at = clock_timestamp()"


async def test_a_clock_set_back_leaves_no_proof_to_come(server: SetPostgres, engine: AsyncEngine) -> None:
    """T3: it is compared again when it should be, drift ends with the comparison that finds none, and doubt counts."""
    await set_clock(server, engine, AN_HOUR)
    _, manager = await one(engine)
    await execute(engine, DOUBT)
    await execute(engine, COMPARED, missing=1)
    await look_once(manager)
    await set_clock(server, engine, 0)
    await execute(engine, COMPARED, missing=0)
    checked = (await manager.backend_status("search")).checked
    assert checked is not None
    assert checked.left == 0, "the comparison that came last is not the latest"
    await look_once(manager)
    assert not await value(engine, TO_COME)
    await execute(engine, COMPARED, missing=0)
    assert (await manager.backend_status("search")).reasons == ()
    await execute(engine, DOUBT)
    (reason,) = (await manager.backend_status("search")).reasons
    assert reason.startswith("history")


async def test_a_clock_set_back_hides_no_doubt(engine: AsyncEngine) -> None:
    """T3: what was compared by the old time, and is not to come by the new one, was compared before the doubt."""
    _, manager = await one(engine)
    await execute(engine, COMPARED, missing=0)
    await execute(engine, "update outbox_reconciliation set started_at = now() - interval '10 seconds'")
    await execute(engine, "update outbox_secondary set doubted_at = now() + interval '30 seconds'")
    await execute(engine, "update outbox_secondary set looked_at = now() + interval '1 minute'")
    await look_once(manager)
    assert not await value(engine, TO_COME)
    assert (await manager.backend_status("search")).doubted


async def test_lag_is_never_negative_whichever_way_the_clock_was_set(server: SetPostgres, engine: AsyncEngine) -> None:
    """T7: of what waits, is in hand and is held; zero once nothing is owed."""
    secondary, manager = await one(engine)
    secondary.always("held", Retry("busy"))
    await write(manager, change("held"))
    await manager.relay().run_once("search")
    await write(manager, change("in hand"))
    assert await claim_by_hand(engine, "search", lease=timedelta(minutes=5))
    await write(manager, change("waiting"))
    seen = []
    for seconds in (AN_HOUR, 0, -AN_HOUR, AN_HOUR):
        await set_clock(server, engine, seconds)
        status = await manager.backend_status("search")
        assert status.pending == 3
        assert status.silence >= timedelta(0)
        seen.append(round(status.lag / timedelta(seconds=AN_HOUR)))
    assert seen == [1, 0, 0, 1]
    secondary.heal("held")
    await execute(engine, "update outbox_attempt set lease_until = clock_timestamp() - interval '1 second'")
    async with running(manager.relay()):
        await eventually(lambda: nothing_owed(engine), SOON)
    assert (await manager.backend_status("search")).lag == timedelta(0)


async def test_a_day_is_as_long_when_clocks_go_forward(server: SetPostgres, engine: AsyncEngine) -> None:
    """T6: for a role in Berlin the night has an hour less; leases and schedules of a day do not."""
    await execute(engine, "alter role postgres set timezone = 'Europe/Berlin'")
    now: datetime = await value(engine, "select clock_timestamp()")
    evening = datetime(now.year + 1, 3, 24, 18, tzinfo=UTC)
    # The last Sunday of March begins at most a day later.
    evening += timedelta(days=(5 - evening.weekday()) % 7)
    await set_clock(server, engine, int((evening - now).total_seconds()))
    hours = "select extract(epoch from clock_timestamp() + interval '1 day' - clock_timestamp()) / 3600"
    assert round(await value(engine, hours)) == 23, "nothing happens in this night"
    secondary = ScriptedSecondary("search")
    days: dict[str, Any] = {"lease": 86_400, "attempt_deadline": 86_400, "retry_max": 2 * 86_400}
    manager = manager_of(engine, secondary, **days, breaker_threshold=1)
    await manager.register()
    secondary.script("1", Retry("busy", after=timedelta(days=1)))
    await write(manager, change("1"))
    await manager.relay().run_once("search")
    secondary.down = Unavailable("throttled", "", retry_after=timedelta(days=1))
    await write(manager, change("2"))
    await manager.relay().run_once("search")
    seconds = "select round(extract(epoch from {})) from {}"
    held = seconds.format("next_attempt_at - last_failed_at", "outbox_hold where resource_id = '1'")
    leased = seconds.format("min(lease_until - started_at)", "outbox_attempt")
    opened = seconds.format(
        "breaker_until - max(finished_at)", "outbox_secondary, outbox_attempt group by breaker_until"
    )
    assert [int(await value(engine, each)) for each in (held, leased, opened)] == [86_400] * 3
