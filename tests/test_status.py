"""What is said to be owed is what is owed: counts and lag, while everything moves."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from waiting import eventually

from outbox import (
    Applied,
    BackendSyncStatus,
    MemorySecondary,
    Outcome,
    Registration,
    Rejected,
    Relay,
    ResourceDigest,
    Retry,
    Stale,
    SyncConfig,
    SyncEvent,
    SyncManager,
    Unavailable,
)
from outbox.testing.binaries import find_binaries
from outbox.testing.child import ServerMissing
from outbox.testing.postgres import PostgresServer

HOUR = timedelta(hours=1)
QUICK = SyncConfig(
    batch_size=7,
    lease=timedelta(seconds=2),
    poll_interval=timedelta(milliseconds=10),
    retry_initial=timedelta(milliseconds=5),
    retry_max=timedelta(milliseconds=50),
    max_attempts=3,
    breaker_initial=timedelta(milliseconds=20),
    breaker_max=timedelta(milliseconds=100),
    prune_interval=timedelta(milliseconds=50),
    doorbell=False,
)

# Everything counted afresh from the rows, with no use of what has been folded: no attempt is old enough to be pruned.
RECOUNT = """
with owed as (
    select backend_id, event_id from outbox_delivery
    union all select backend_id, unnest(event_ids) from outbox_attempt where finished_at is null
    union all select backend_id, unnest(event_ids) from outbox_hold
), pending as (
    select owed.backend_id, count(*) as pending, min(event.created_at) as oldest
    from owed left join outbox as event using (event_id) group by owed.backend_id
), attempt as (
    select backend_id, coalesce(sum(cardinality(event_ids)) filter (where finished_at is null), 0) as in_flight,
           sum(applied) as applied, sum(stale) as stale, sum(superseded) as superseded, sum(retried) as retried,
           sum(rejected) as rejected, sum(lost) as lost,
           max(finished_at) filter (where applied + stale > 0) as last_success_at,
           max(finished_at) filter (where error_code is not null) as last_error_at
    from outbox_attempt group by backend_id
), hold as (
    select backend_id, count(*) filter (where state = 'retrying') as failing,
           count(*) filter (where state = 'dead') as dead
    from outbox_hold group by backend_id
)
select secondary.backend_id, secondary.status, coalesce(pending.pending, 0) as pending,
       coalesce(attempt.in_flight, 0) as in_flight, coalesce(hold.failing, 0) as failing,
       coalesce(hold.dead, 0) as dead,
       greatest(statement_timestamp() - pending.oldest, interval '0') as lag, secondary.breaker,
       attempt.last_success_at, attempt.last_error_at,
       (select error_code from outbox_attempt as each
        where each.backend_id = secondary.backend_id and each.finished_at = attempt.last_error_at
        and error_code is not null order by error_code desc limit 1) as last_error_code,
       coalesce(attempt.applied, 0) as applied, coalesce(attempt.stale, 0) as stale,
       coalesce(attempt.superseded, 0) as superseded, coalesce(attempt.retried, 0) as retried,
       coalesce(attempt.rejected, 0) as rejected, coalesce(attempt.lost, 0) as lost,
       (select coalesce(sum(events), 0) from outbox_discarded as each
        where each.backend_id = secondary.backend_id) as discarded, secondary.looked_at, secondary.beyond,
       statement_timestamp() - coalesce(secondary.looked_at, secondary.registered_at) as silence
from outbox_secondary as secondary
left join pending using (backend_id) left join attempt using (backend_id) left join hold using (backend_id)
order by secondary.backend_id
"""

# One statement, so one snapshot and one instant for both.
COMPARE = f"""
select to_jsonb(said) as said, to_jsonb(found) as found, (select count(*) from outbox) as recorded
from outbox_lag as said full join ({RECOUNT}) as found using (backend_id)
order by backend_id
"""


class Moody:
    """A secondary that does everything a secondary may do, at random; pytest-randomly prints the seed."""

    def __init__(self, backend_id: str) -> None:
        self.backend_id = backend_id

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        await asyncio.sleep(random.uniform(0, 0.01))
        if random.random() < 0.05:
            raise Unavailable("refused", "not now")
        return random.choices(
            [Applied(), Stale(), Retry("busy"), Rejected("malformed")], weights=[80, 8, 8, 4], k=len(batch)
        )

    async def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> AsyncIterator[ResourceDigest]:
        return
        yield


class Held(MemorySecondary):
    """A secondary that answers when told to, and what it is told."""

    def __init__(self) -> None:
        super().__init__("held")
        self.asked = asyncio.Event()
        self.answers: asyncio.Queue[Outcome] = asyncio.Queue()

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        self.asked.set()
        outcome = await self.answers.get()
        return [outcome] * len(batch)


def manager_on(engine: AsyncEngine) -> SyncManager:
    """State and log order, a secondary that wants little, and one that no relay serves."""
    few = Registration(Moody("few"), tenant_ids=["tenant-1"])
    return SyncManager(engine, [Moody("newest"), Registration(Moody("every"), ordering="log"), few], config=QUICK)


@asynccontextmanager
async def under_load(engine: AsyncEngine) -> AsyncIterator[SyncManager]:
    """Two relays and a writer at work; a fourth secondary is registered and has no relay."""
    manager = manager_on(engine)
    await SyncManager(engine, [MemorySecondary("nobody")]).register()
    relays = [manager.relay(), manager_on(engine).relay()]
    await manager.register()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(relay.run()) for relay in relays]
        writing = group.create_task(_write(manager))
        yield manager
        writing.cancel()
        _stop(relays)
        await asyncio.wait(tasks)


def _stop(relays: list[Relay]) -> None:
    for relay in relays:
        relay.stop(at_once=True)


async def _write(manager: SyncManager) -> None:
    while True:
        async with manager.session() as session, session.begin():
            session.record(_change() for _ in range(random.randint(1, 20)))
        await asyncio.sleep(random.uniform(0, 0.02))


def _change() -> SyncEvent:
    key, tenant = str(random.randint(1, 40)), f"tenant-{random.randint(1, 4)}"
    if random.random() < 0.2:
        return SyncEvent.delete("Thing", key, tenant_id=tenant)
    return SyncEvent.update("Thing", key, {"value": random.random()}, tenant_id=tenant)


async def rows(engine: AsyncEngine, statement: str) -> list[dict[str, Any]]:
    async with engine.connect() as connection:
        return [dict(row) for row in (await connection.execute(text(statement))).mappings()]


async def execute(engine: AsyncEngine, statement: str) -> None:
    async with engine.begin() as connection:
        await connection.execute(text(statement))


async def moments(engine: AsyncEngine, least: int) -> AsyncIterator[list[dict[str, Any]]]:
    """At random moments, what the view says beside the recount; until every kind of trouble was seen."""
    seen = dict.fromkeys(("in_flight", "failing", "dead", "stale", "superseded", "retried", "rejected", "folded"), 0)
    deadline = asyncio.get_running_loop().time() + 40
    while least > 0 or not all(seen.values()):
        assert asyncio.get_running_loop().time() < deadline, seen
        compared = await rows(engine, COMPARE)
        for row in compared:
            for kind in seen.keys() - {"folded"}:
                seen[kind] += row["found"][kind]
        (folded,) = await rows(engine, "select max(folded_through) as through from outbox_secondary")
        seen["folded"] = folded["through"]
        yield compared
        least -= 1
        await asyncio.sleep(random.uniform(0, 0.02))


async def test_the_view_equals_a_recount_at_any_moment(primary: AsyncEngine) -> None:
    """N1: every number, in one snapshot, while two relays work and fold."""
    async with under_load(primary):
        async for compared in moments(primary, least=100):
            assert [row["found"]["backend_id"] for row in compared] == ["every", "few", "newest", "nobody"]
            for row in compared:
                said, found = row["said"], row["found"]
                del said["lag"], found["lag"]
                assert said == found


async def test_lag_is_the_age_of_the_oldest_that_is_owed_at_any_moment(primary: AsyncEngine) -> None:
    """N2: to the microsecond, because both are taken at one instant of the database's clock."""
    async with under_load(primary):
        async for compared in moments(primary, least=100):
            for row in compared:
                assert row["said"]["lag"] == row["found"]["lag"], row


async def test_what_is_owed_and_what_is_done_add_up_to_what_was_recorded(primary: AsyncEngine) -> None:
    """Promise 2: counts always add up; no delivery is lost or counted twice at any moment."""
    async with under_load(primary):
        async for compared in moments(primary, least=100):
            for row in compared:
                said = row["said"]
                if said["backend_id"] != "few":
                    done = said["applied"] + said["stale"] + said["superseded"]
                    assert done + said["pending"] == row["recorded"], said


async def test_all_statuses_equals_a_recount_in_the_same_snapshot(primary: AsyncEngine) -> None:
    """N1, through the API: it is shown the very snapshot that the recount used."""
    shared = create_async_engine(primary.url, isolation_level="REPEATABLE READ")
    snapshot = ""

    @event.listens_for(shared.sync_engine, "begin")
    def _enter_the_snapshot(connection: Any) -> None:
        connection.exec_driver_sql(f"set transaction snapshot '{snapshot}'")

    async with under_load(primary), primary.connect() as connection:
        for _ in range(30):
            await connection.execute(text("begin isolation level repeatable read"))
            snapshot = (await connection.scalars(text("select pg_export_snapshot()"))).one()
            found = (await connection.execute(text(RECOUNT))).mappings().all()
            said = await SyncManager(shared).all_statuses()
            await connection.rollback()
            assert [_comparable(each) for each in said] == [_comparable(each) for each in found]
            await asyncio.sleep(random.uniform(0, 0.02))
    await shared.dispose()


def _comparable(status: Any) -> dict[str, Any]:
    known = msgspec.structs.asdict(status) if isinstance(status, BackendSyncStatus) else dict(status)
    # Ages differ from one statement to the next, and the last few are not of the tables' counts.
    others = {"lag", "silence", "looked_at", "throughput", "reasons", "checked", "doubted"}
    return {name: known[name] for name in known.keys() - others}


async def test_totals_are_the_same_before_and_after_folding(primary: AsyncEngine) -> None:
    """A fold moves counts from attempts to the registry and changes no answer."""
    manager = SyncManager(primary, [Moody("newest"), Registration(Moody("every"), ordering="log")], config=QUICK)
    await manager.register()
    async with manager.session() as session, session.begin():
        session.record(_change() for _ in range(300))
    relay = manager.relay()
    await eventually(lambda: _drained(primary, relay))
    assert await _folded(primary) == [0, 0]
    # Nothing may become due meanwhile.
    await execute(primary, "update outbox_hold set next_attempt_at = null, state = 'dead' where page = 0")
    before = [_comparable(each) for each in await manager.all_statuses()]
    assert sum(each["applied"] for each in before) > 0
    running = asyncio.create_task(relay.run())
    await eventually(lambda: _all_folded(primary))
    relay.stop()
    await running
    assert [_comparable(each) for each in await manager.all_statuses()] == before


async def _drained(engine: AsyncEngine, relay: Relay) -> bool:
    await relay.drain()
    (row,) = await rows(engine, "select count(*) as waiting from outbox_delivery")
    return row["waiting"] == 0


async def _folded(engine: AsyncEngine) -> list[int]:
    found = await rows(engine, "select folded_through from outbox_secondary order by backend_id")
    return [row["folded_through"] for row in found]


async def _all_folded(engine: AsyncEngine) -> bool:
    (row,) = await rows(
        engine,
        "select count(*) as unfolded from outbox_secondary join outbox_attempt using (backend_id) "
        "where attempt_id > folded_through",
    )
    return row["unfolded"] == 0


async def test_lag_counts_an_event_wherever_it_is_until_it_is_done(primary: AsyncEngine) -> None:
    """N2: waiting, in flight, retrying, dead; and zero when nothing is owed."""
    secondary = Held()
    manager = SyncManager(primary, [secondary], config=QUICK)
    await manager.register()
    assert await _lag(manager) == timedelta(0)
    for resource_id in ("old", "new"):
        async with manager.session() as session, session.begin():
            session.record(SyncEvent.create("Thing", resource_id, {}))
    # By hand, for an event that is an hour old by the database's clock.
    await execute(primary, "update outbox set created_at = created_at - interval '1 hour' where resource_id = 'old'")
    assert await _hour_behind(manager, pending=2)

    relay = manager.relay()
    running = asyncio.create_task(relay.run())
    await secondary.asked.wait()
    assert await _hour_behind(manager, pending=2, in_flight=2)
    secondary.answers.put_nowait(Retry("busy", after=timedelta(seconds=5)))
    await eventually(lambda: _hour_behind(manager, pending=2, failing=2))
    secondary.asked.clear()
    await execute(primary, "update outbox_hold set next_attempt_at = now()")
    await secondary.asked.wait()
    secondary.answers.put_nowait(Rejected("malformed"))
    await eventually(lambda: _hour_behind(manager, pending=2, dead=2))
    await _supersede_both(manager, secondary)
    await eventually(lambda: _is_level(manager))
    relay.stop()
    await running


@pytest.mark.parametrize("ordering", ["state", "log"])
async def test_lag_forgets_what_is_done_while_its_key_is_still_held(primary: AsyncEngine, ordering: Any) -> None:
    """N2: the oldest that is owed; in state order a newer event supersedes it, in log order it was delivered."""
    secondary = Held()
    patient = QUICK.model_copy(update={"retry_max": timedelta(minutes=1)})
    manager = SyncManager(primary, [Registration(secondary, ordering=ordering)], config=patient)
    await manager.register()
    await _record(manager, 1)
    await execute(primary, "update outbox set created_at = created_at - interval '1 hour'")
    secondary.answers.put_nowait(Retry("busy", after=timedelta(seconds=50)))
    relay = manager.relay()
    await relay.drain()
    assert await _hour_behind(manager, pending=1, failing=1)
    # More than a batch, so that in log order the rest stays in the hold.
    await _record(manager, 2 * QUICK.batch_size)
    await eventually(lambda: _absorbed(primary, relay))
    if ordering == "log":
        assert await _hour_behind(manager, pending=1 + 2 * QUICK.batch_size)
        await execute(primary, "update outbox_hold set next_attempt_at = now()")
        for _ in range(QUICK.batch_size):
            secondary.answers.put_nowait(Applied())
        assert await relay.run_once("held") == QUICK.batch_size
    assert (await manager.backend_status("held")).pending > 0
    assert await _lag(manager) < timedelta(minutes=2)


async def _record(manager: SyncManager, events: int) -> None:
    async with manager.session() as session, session.begin():
        session.record(SyncEvent.update("Thing", "1", {"value": value}) for value in range(events))


async def _absorbed(engine: AsyncEngine, relay: Relay) -> bool:
    await relay.run_once("held")
    (row,) = await rows(engine, "select count(*) as waiting from outbox_delivery")
    return row["waiting"] == 0


async def _supersede_both(manager: SyncManager, secondary: Held) -> None:
    async with manager.session() as session, session.begin():
        session.record(SyncEvent.update("Thing", name, {}) for name in ("old", "new"))
    for _ in range(4):
        secondary.answers.put_nowait(Applied())


async def _lag(manager: SyncManager) -> timedelta:
    (status,) = await manager.all_statuses()
    return status.lag


async def _hour_behind(manager: SyncManager, **expected: int) -> bool:
    (status,) = await manager.all_statuses()
    assert HOUR <= status.lag < HOUR + timedelta(minutes=2)
    assert {name: getattr(status, name) for name in expected} == expected
    return True


async def _is_level(manager: SyncManager) -> bool:
    (status,) = await manager.all_statuses()
    assert (status.pending, status.lag, status.dead) == (0, timedelta(0), 0)
    return True


async def test_lag_of_an_event_from_the_future_is_zero_and_not_negative(primary: AsyncEngine) -> None:
    """N2: a restored or adjusted clock may leave such an event; nothing is behind by less than nothing."""
    manager = SyncManager(primary, [MemorySecondary()])
    await manager.register()
    async with manager.session() as session, session.begin():
        session.record(SyncEvent.create("Thing", "1", {}))
    await execute(primary, "update outbox set created_at = created_at + interval '1 hour'")
    assert await _lag(manager) == timedelta(0)


async def test_the_view_answers_to_plain_psql(postgres: PostgresServer, primary: AsyncEngine) -> None:
    """The first question of whoever is on call, with no tool of ours at hand."""
    manager = SyncManager(primary, [MemorySecondary("search")])
    await manager.register()
    async with manager.session() as session, session.begin():
        session.record(SyncEvent.create("Thing", "1", {}))
    dsn = primary.url.set(drivername="postgresql").render_as_string(hide_password=False)
    command = [_psql(), "-X", "--csv", "-c", "select * from outbox_lag", dsn]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
    header, answer = (line.split(",") for line in done.stdout.splitlines())
    said = dict(zip(header, answer, strict=True))
    assert (said["backend_id"], said["status"], said["pending"], said["dead"]) == ("search", "live", "1", "0")
    assert said["lag"].startswith("00:0")
    assert set(header) == set(BackendSyncStatus.__struct_fields__) - {"throughput", "reasons", "checked", "doubted"}


def _psql() -> str:
    try:
        beside_the_server = find_binaries() / "psql"
    except ServerMissing:
        beside_the_server = None
    found = shutil.which("psql", path=None) or (beside_the_server and shutil.which(beside_the_server))
    return str(found) if found else pytest.skip("psql is not installed")
