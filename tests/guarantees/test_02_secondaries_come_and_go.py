"""D7, G2: a secondary that is added under load misses nothing, and one that is removed leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox import (
    MemorySecondary,
    ReconciliationResult,
    Registration,
    SettingsError,
    StoredResource,
    SyncManager,
    UnknownSecondary,
)
from outbox.content import content_digest
from outbox.secondaries.base import Rejected
from outbox.secondaries.sql import SqlSecondary
from tests.relaying import dsn_of, manager_of, pending, running, value
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

ROOT = Path(__file__).parent.parent.parent


class Base(DeclarativeBase): ...


class Ward(Base):
    __tablename__ = "ward"
    number: Mapped[str] = mapped_column(primary_key=True)
    beds: Mapped[int]


def wards(engine: AsyncEngine, *secondaries: Any, **settings: Any) -> SyncManager:
    """A manager that tracks wards."""
    manager = manager_of(engine, *secondaries, **settings)
    manager.track(Ward, resource_id=Ward.number)
    return manager


@pytest.fixture
async def ward(primary: AsyncEngine) -> AsyncEngine:
    """The primary, with a table of wards."""
    async with primary.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    return primary


async def build(manager: SyncManager, numbers: range, beds: int = 0) -> None:
    async with manager.session() as session, session.begin():
        session.add_all(Ward(number=str(number), beds=beds) for number in numbers)


async def contents(engine: AsyncEngine) -> dict[str, str]:
    """What the primary holds, as digests."""
    async with engine.connect() as connection:
        rows = await connection.execute(select(Ward.number, Ward.beds))
        return {row.number: content_digest(json.dumps({"number": row.number, "beds": row.beds})) for row in rows}


def held(secondary: MemorySecondary) -> dict[str, str]:
    """What a secondary holds, as digests."""
    return {
        event.resource_id: content_digest(event.content)
        for event in secondary.held.values()
        if event.content is not None
    }


@asynccontextmanager
async def writers(manager: SyncManager, seed: int) -> AsyncIterator[None]:
    """Build, change and close wards until the block ends, in transactions that take their time."""
    stop = asyncio.Event()

    async def write(chance: random.Random) -> None:
        while not stop.is_set():
            async with manager.session() as session, session.begin():
                number = str(chance.randrange(300))
                found = await session.get(Ward, number, with_for_update=True)
                if found is None:
                    session.add(Ward(number=f"{number}-{chance.getrandbits(32)}", beds=chance.randrange(100)))
                elif chance.random() < 0.2:
                    await session.delete(found)
                else:
                    found.beds = chance.randrange(1_000)
                await session.flush()
                await asyncio.sleep(chance.random() * 0.02)

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(write(random.Random(f"{seed}-{number}")))
        try:
            yield
        finally:
            stop.set()


async def test_a_secondary_is_added_while_writers_write_and_equals_the_primary(ward: AsyncEngine) -> None:
    """D7: nothing it should have had is missing when it is live, and every step is told."""
    old, new = ScriptedSecondary("old"), ScriptedSecondary("new")
    writing = wards(ward, old)
    await writing.register()
    await build(writing, range(300))
    told: list[str] = []
    manager = wards(ward, old, new)
    async with running(writing.relay()), writers(writing, 1):
        added = await manager.add("new", tell=told.append)
    assert added.equal
    assert (added.status, added.dead, (await manager.backend_status("new")).status) == ("live", 0, "live")
    await manager.relay().drain()
    assert held(new) == held(old) == await contents(ward)
    assert told[0].startswith("new is registered and shadow")
    assert told[-1] == "new equals the primary and is live"
    assert (await manager.reconcile("new")).in_sync


async def test_a_writer_that_recorded_before_it_was_known_is_not_missed(ward: AsyncEngine) -> None:
    """D7, G2: it commits after everything else was filled."""
    old, new = ScriptedSecondary("old"), ScriptedSecondary("new")
    writing, manager = wards(ward, old), wards(ward, old, new)
    await writing.register()
    await build(writing, range(10))
    async with writing.session() as late:
        async with late.begin():
            late.add(Ward(number="late", beds=7))
            await late.flush()
            told: list[str] = []
            adding = asyncio.create_task(manager.add("new", tell=told.append))
            await eventually(lambda: any("waiting for transactions" in line for line in told))
            assert await value(ward, "select count(*) from outbox_backfill") == 0
        added = await adding
    assert added.equal
    assert "late" in held(new)


async def test_a_writer_with_an_old_snapshot_is_not_missed(ward: AsyncEngine) -> None:
    """D7, G2: in repeatable read it records by the registry of its first statement, however late."""
    old, new = ScriptedSecondary("old"), ScriptedSecondary("new")
    writing, manager = wards(ward, old), wards(ward, old, new)
    await writing.register()
    await build(writing, range(10))
    async with writing.session() as late:
        await late.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        await late.get(Ward, "1")
        told: list[str] = []
        adding = asyncio.create_task(manager.add("new", tell=told.append))
        await eventually(lambda: any("waiting for transactions" in line for line in told))
        late.add(Ward(number="late", beds=7))
        await late.flush()
        assert await value(ward, "select count(*) from outbox_delivery where backend_id = 'new'") == 0
        await late.commit()
        await adding
    assert "late" in held(new)


async def test_one_that_does_not_become_equal_stays_a_shadow(ward: AsyncEngine) -> None:
    """D7: what is dead is a difference, too; once it is mended, the same call goes on and makes it live."""
    new = ScriptedSecondary("new")
    manager = wards(ward, new)
    await build_without_anybody(manager, ward)
    new.always("3", Rejected("malformed"))
    added = await manager.add("new")
    assert (added.equal, added.status, added.dead) == (False, "shadow", 1)
    new.heal("3")
    await manager.redrive()
    assert (await manager.add("new")).status == "live"
    assert held(new) == await contents(ward)


async def test_a_key_that_dies_while_it_is_compared_is_a_difference(
    ward: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D7: the comparison leaves out what is in flight, and what becomes of that is part of its answer."""
    new = ScriptedSecondary("new")
    manager = wards(ward, new)
    await build_without_anybody(manager, ward)
    new.always("77", Rejected("malformed"))
    compare = manager.reconcile

    async def compare_and_write(*names: Any, **terms: Any) -> ReconciliationResult:
        proof = await compare(*names, **terms)
        await build(manager, range(77, 78))
        return proof

    monkeypatch.setattr(manager, "reconcile", compare_and_write)
    added = await manager.add("new")
    assert added.proof.in_sync
    assert (added.equal, added.status, added.dead) == (False, "shadow", 1)


async def build_without_anybody(manager: SyncManager, engine: AsyncEngine) -> None:
    """Rows that were there before any outbox was."""
    async with engine.begin() as connection:
        await connection.exec_driver_sql("insert into ward select n::text, n from generate_series(0, 9) as n")


async def test_one_that_is_live_is_filled_all_the_same(ward: AsyncEngine) -> None:
    """D7: a relay with the new configuration came first, and registered it as live."""
    new = ScriptedSecondary("new")
    manager = wards(ward, new)
    await build_without_anybody(manager, ward)
    await manager.relay().drain()
    assert new.held == {}
    assert (await manager.add("new")).status == "live"
    assert held(new) == await contents(ward)


async def test_one_that_was_removed_is_added_again_from_the_beginning(ward: AsyncEngine) -> None:
    """D7: it missed what was written meanwhile, deletes included."""
    new = ScriptedSecondary("new")
    manager = wards(ward, ScriptedSecondary("old"), new)
    await manager.register()
    await build(manager, range(20))
    await manager.relay().drain()
    assert (await manager.add("new")).equal
    assert (await manager.remove("new")).given_up == 0
    async with manager.session() as session, session.begin():
        await session.delete(await session.get(Ward, "3"))
        (await session.get_one(Ward, "4")).beds = 44
    bulk_id, _ = await manager.sync_bulk([StoredResource(resource_type="Note", resource_id="1", content={})])
    await manager.relay().drain()
    assert held(new) != await contents(ward)
    assert (await manager.add("new")).status == "live"
    assert held(new) == await contents(ward)
    assert [each.backend_id for each in await manager.bulk_status(bulk_id)] == ["old"]


async def test_add_refuses_what_it_cannot_fill(ward: AsyncEngine) -> None:
    manager = wards(ward, ScriptedSecondary("new"))
    await manager.register()
    await manager.pause("new")
    with pytest.raises(UnknownSecondary, match="paused"):
        await manager.add("new")
    with pytest.raises(UnknownSecondary):
        await manager.add("nobody")
    with pytest.raises(SettingsError, match="tracking"):
        await manager_of(ward, ScriptedSecondary("new")).add("new")


async def test_a_secondary_is_removed_while_writers_write(ward: AsyncEngine) -> None:
    """D7: nothing is pending for it, no relay has anything of it, the others lose nothing, and the counts add up."""
    stays, goes = ScriptedSecondary("stays"), ScriptedSecondary("goes")
    manager = wards(ward, stays, goes, attempts_in_flight=2)
    await manager.register()
    await build(manager, range(300))
    async with running(manager.relay(), manager.relay()), writers(manager, 2):
        await eventually(lambda: len(goes.held) >= 300)
        goes.hang()
        await eventually(lambda: len(goes.running) >= 2)
        removal = await manager.remove("goes", discard=True)
        assert removal.in_hand
        goes.release()
        after = await value(ward, "select last_value from outbox_event_id_seq")
        await eventually(lambda: value(ward, f"select last_value > {after + 50} from outbox_event_id_seq"))
        assert await pending(ward, "goes") == 0
    await manager.relay().drain()
    assert held(stays) == await contents(ward)
    status = await manager.backend_status("goes")
    assert (status.status, status.pending) == ("removed", 0)
    assert status.discarded == removal.given_up
    recorded = await value(
        ward,
        """select count(*) from outbox as event where not exists (
               select from outbox_attempt as attempt
               where attempt.backend_id = 'goes' and event.event_id = any (attempt.event_ids)
           ) and not exists (
               select from outbox_discarded as note where note.backend_id = 'goes'
                  and note.resource_id = event.resource_id and event.event_id between note.oldest_id and note.event_id
           ) and event.event_id < (select max(event_id) from outbox_discarded)""",
    )
    assert recorded == 0, "an event is neither delivered nor noted"


ADDING = """
import asyncio, sys
from tests.guarantees.test_02_secondaries_come_and_go import adding
asyncio.run(adding(*sys.argv[1:]))
"""


def tell(line: str) -> None:
    """Say it at once: the next moment may be the last."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def adding(primary: str, copy: str) -> None:
    """Add a copy in another database. Runs in a process of its own, to be killed."""
    engine = create_async_engine(primary)
    manager = wards(engine, Registration(SqlSecondary("copy", copy)), lease=0.5)
    tell("begun")
    added = await manager.add("copy", tell=tell)
    tell("equal" if added.equal else "differs")
    await manager.aclose()
    await engine.dispose()


@pytest.mark.timeout(180)
async def test_an_addition_that_is_killed_at_any_moment_goes_on_where_it_was(
    ward: AsyncEngine, database: str, tmp_path: Path
) -> None:
    """D7, K4: under load, with a process that is killed again and again until one comes to the end."""
    chance = random.Random(3)
    writing = wards(ward, ScriptedSecondary("old"), lease=0.5)
    await writing.register()
    await build(writing, range(1_500))
    log, kills = tmp_path / "adding", 0
    arguments = [sys.executable, "-c", ADDING, dsn_of(ward), database]
    async with running(writing.relay()), writers(writing, 3):
        while "equal" not in (log.read_text().split() if log.exists() else []):
            with log.open("ab") as output:
                begun = log.stat().st_size
                process = started(arguments, output)
            try:
                await eventually(lambda size=begun: log.stat().st_size > size)
                deadline = timedelta(seconds=0.1 + chance.random() * 1.2) if kills < 5 else timedelta(seconds=60)
                await ended(process, deadline)
            finally:
                if process.poll() is None:
                    kills += 1
                process.kill()
                process.wait()
            assert kills < 8, log.read_text()
    assert kills >= 3, f"killed {kills} times only:\n{log.read_text()}"
    manager = wards(ward, SqlSecondary("copy", database), lease=0.5)
    await eventually(lambda: drained(manager))
    assert (await manager.backend_status("copy")).status == "live"
    proof = await manager.reconcile("copy")
    assert proof.in_sync
    assert proof.secondary_count == len(await contents(ward))
    await manager.aclose()


def started(arguments: list[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(arguments, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)


async def ended(process: subprocess.Popen[bytes], within: timedelta) -> None:
    """Wait for a process to end, but no longer than so."""
    with suppress(AssertionError):
        await eventually(lambda: process.poll() is not None, within)


async def drained(manager: SyncManager) -> bool:
    await manager.relay().drain()
    return (await manager.backend_status("copy")).pending == 0
