"""Promise 2: no committed event is lost at a crash of a relay or of PostgreSQL, and the counts always add up."""

from __future__ import annotations

import asyncio
import random
from datetime import timedelta
from functools import partial
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox import Registration, SyncEvent, SyncManager
from outbox.errors import Unavailable
from outbox.migrate import migrate
from outbox.secondaries.base import Rejected, Retry
from tests.relay_process import Effects, RelayProcess, effects_in, told
from tests.relaying import (
    change,
    claim_by_hand,
    claim_on,
    dsn_of,
    manager_of,
    own_server,
    pending,
    raw,
    rows,
    running,
    value,
    write,
)
from tests.scripted import ScriptedSecondary, Step
from tests.waiting import eventually

# One statement, one snapshot. Nothing is pruned here, so the events are the deliveries ever created.
ACCOUNT = """
select backend_id, applied + stale + superseded + pending as accounted, (select count(*) from outbox) as created,
       in_flight, failing, dead, lost
from outbox_lag order by backend_id
"""
POSITIONS = "select resource_id, max(event_id) as position from outbox group by resource_id"


class Moody(ScriptedSecondary):
    """Fails in every way, by chance, until it is calm."""

    calm = False

    def step_for(self, event: SyncEvent) -> Step | None:
        if self.calm or random.random() > 0.08:
            return None
        steps = [Retry("moody"), Retry("moody"), Rejected("moody"), Unavailable("moody", ""), RuntimeError("moody")]
        return random.choice(steps)


async def test_counts_add_up_at_every_moment_under_load(primary: AsyncEngine) -> None:
    """Promise 2, D8 and N1: applied + stale + superseded + pending is what was created, whenever one looks."""
    moody = [Moody("archive", pace=lambda: random.random() / 100), Moody("newest", pace=lambda: random.random() / 100)]
    terms = [Registration(moody[0], ordering="log"), moody[1]]
    managers = [manager_of(primary, *terms, batch_size=10, max_attempts=3) for _ in range(2)]
    await managers[0].register()
    writing = asyncio.create_task(_write_at_random(managers[0], 150))
    seen = []
    async with running(*(manager.relay() for manager in managers)):
        while not writing.done():
            seen += await rows(primary, ACCOUNT)
        await writing
        for secondary in moody:
            secondary.calm = True
        await eventually(lambda: _only_the_dead_are_owed(primary))
    seen += await rows(primary, ACCOUNT)

    wrong = [account for account in seen if account["accounted"] != account["created"]]
    assert wrong == [], f"{len(wrong)} of {len(seen)} do not add up"
    for state in ("in_flight", "failing", "dead"):
        assert any(account[state] for account in seen), f"the load never made anything {state}"


async def _write_at_random(manager: SyncManager, transactions: int) -> None:
    for number in range(transactions):
        await write(manager, *(change(str(random.randrange(12)), number) for _ in range(random.randint(1, 8))))


async def _only_the_dead_are_owed(primary: AsyncEngine) -> bool:
    owed = """
    select coalesce(sum(cardinality(event_ids)), 0) from outbox_hold
    where (backend_id, key_hash) in (select backend_id, key_hash from outbox_hold where state = 'dead')
    """
    return await pending(primary) == await value(primary, owed)


async def test_what_a_waiting_hold_absorbed_is_never_missing_from_the_counts(primary: AsyncEngine) -> None:
    """Promise 2, N1: what is superseded by absorption counts, while the attempt that did it is open and after."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, retry_initial=30, retry_max=30)
    await manager.register()
    secondary.always("failing", Retry("no"))
    await write(manager, change("failing", 1))
    assert await manager.relay().run_once("search") == 1
    await write(manager, change("failing", 2), change("failing", 3), change("other"))
    secondary.hang()
    carrying = asyncio.create_task(manager.relay().run_once("search"))
    await eventually(lambda: secondary.running)
    while_open = await rows(primary, ACCOUNT)
    secondary.release()
    assert await carrying == 1
    after = await rows(primary, ACCOUNT)

    assert [account["in_flight"] for account in while_open + after] == [1, 0]
    assert [account["accounted"] for account in while_open + after] == [4, 4]


async def test_what_a_lost_attempt_held_is_counted_and_delivered(primary: AsyncEngine) -> None:
    """Promise 2, D1: a relay that vanished with a batch in hand leaves a closed attempt `lost` and its keys due."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary)
    await manager.register()
    await write(manager, *(change(str(number)) for number in range(5)))
    vanished = await claim_by_hand(primary, "search")
    assert vanished is not None
    async with running(manager.relay()):
        await eventually(lambda: len(secondary.held) == 5)
        await eventually(lambda: _is(primary, 0))

    history = await rows(primary, "select * from outbox_attempt order by attempt_id")
    assert history[0]["attempt_id"] == vanished.attempt_id
    assert (history[0]["lost"], history[0]["error_code"]) == (5, "lost")
    (account,) = await rows(primary, ACCOUNT)
    assert (account["lost"], account["accounted"]) == (5, 5)


async def _is(primary: AsyncEngine, owed: int) -> bool:
    return await pending(primary) == owed


async def test_a_relay_killed_in_mid_batch_loses_nothing(primary: AsyncEngine, database: str, tmp_path: Path) -> None:
    """Promise 2, D1: SIGKILL at moments of chance, and once surely while a batch is out."""
    manager = manager_of(primary, ScriptedSecondary("effects"))
    await manager.register()
    async with effects_in(database) as effects:

        def start() -> RelayProcess:
            return RelayProcess(dsn_of(primary), effects.dsn, tmp_path / "relay.log", batch_size=20, lease=0.3)

        for round_ in range(3):
            already = len(await effects.asked())
            await write(manager, *(change(str(random.randrange(80)), round_) for _ in range(120)))
            with start() as relay:
                # One of each key may be all that goes out, and there are some sixty keys among these.
                await eventually(partial(_asked, effects, already + random.randint(1, 40)))
                relay.kill()
        await write(manager, told("surely", "wait:end"), *(change(str(number), 9) for number in range(40)))
        with start() as relay:
            await eventually(lambda: effects.asked("surely"))
            relay.kill()
        await effects.open_gate("end")
        with start():
            await eventually(lambda: _is(primary, 0), timedelta(seconds=40))
        newest = {row["resource_id"]: row["position"] for row in await rows(primary, POSITIONS)}
        assert await effects.held() == newest
    (account,) = await rows(primary, ACCOUNT)
    assert account["accounted"] == account["created"]
    assert account["lost"] >= 1


async def _asked(effects: Effects, least: int) -> bool:
    return len(await effects.asked()) >= least


async def test_everything_committed_arrives_after_postgres_crashed_under_load() -> None:
    """Promise 2, D2: PostgreSQL dies by SIGKILL twice under load; the relay comes back by itself."""
    secondary = ScriptedSecondary("search", pace=lambda: 0.005)
    with own_server() as server:
        engine = create_async_engine(server.dsn())
        await migrate(engine)
        manager = manager_of(engine, secondary, batch_size=10)
        await manager.register()
        writer = Writer(manager)
        async with running(manager.relay()):
            writing = asyncio.create_task(writer.write())
            for least in (60, 120):
                await eventually(lambda least=least: len(writer.committed) >= least)
                await asyncio.to_thread(server.crash)
                await asyncio.to_thread(server.start)
            await eventually(lambda: len(writer.committed) >= 180)
            writer.enough = True
            await writing
            await eventually(lambda: _is(engine, 0), timedelta(seconds=40))
        stored = {row["resource_id"]: row["position"] for row in await rows(engine, POSITIONS)}
        await engine.dispose()
    held = {event.resource_id: event.position for event in secondary.held.values()}
    assert set(writer.committed) <= stored.keys()
    assert held == stored, "missing, or a phantom: delivered and then not in the primary"
    assert writer.interrupted, "no crash ever met a writer"


class Writer:
    """Commits one new resource after the other, through crashes, and knows which commits were acknowledged."""

    def __init__(self, manager: SyncManager) -> None:
        self.committed: list[str] = []
        self.interrupted = 0
        self.enough = False
        self._manager = manager

    async def write(self) -> None:
        number = 0
        while not self.enough:
            number += 1
            try:
                await write(self._manager, change(f"r{number}", number))
            except (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                self.interrupted += 1
                await asyncio.sleep(0.02)
            else:
                self.committed.append(f"r{number}")


@pytest.mark.parametrize("ordering", ["state", "log"])
async def test_a_claim_that_fails_half_way_takes_nothing(primary: AsyncEngine, ordering: str) -> None:
    """Promise 2, D1: what a claim did is undone with its transaction, so its deliveries are still there to claim."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, Registration(secondary, ordering="log" if ordering == "log" else "state"))
    await manager.register()
    await write(manager, *(change(str(number)) for number in range(5)))
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await _claim_and_be_cut_off(primary)
    assert await value(primary, "select count(*) from outbox_delivery") == 5
    assert await manager.relay().drain() == 5


async def _claim_and_be_cut_off(primary: AsyncEngine) -> None:
    async with raw(primary) as connection, connection.transaction():
        assert await claim_on(connection, "search")
        await value(primary, "select pg_terminate_backend(:pid)", pid=connection.get_server_pid())
        await connection.fetchval("select 1")
