"""Guarantee 4 when history goes back: a secondary ahead of its primary swallows nothing, and is made equal again."""

from __future__ import annotations

import asyncio
import logging
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

from outbox import MemorySecondary, SyncManager
from outbox.errors import SecondaryError, Unavailable
from outbox.finding import Verdict
from outbox.primary import code_of
from outbox.testing.binaries import find_binaries
from tests.conftest import PostgresServer, new_database
from tests.relaying import change, execute, manager_of, pending, running, value, write
from tests.scripted import ScriptedSecondary, position_of
from tests.waiting import eventually


class Base(DeclarativeBase): ...


class Patient(Base):
    __tablename__ = "patient"
    number: Mapped[str] = mapped_column(primary_key=True)
    family: Mapped[str]


def hospital(engine: AsyncEngine, *secondaries: MemorySecondary) -> SyncManager:
    manager = manager_of(engine, *secondaries)
    manager.track(
        Patient,
        resource_type="Patient",
        resource_id=Patient.number,
        content=lambda patient: {"number": patient.number, "family": patient.family},
    )
    return manager


async def admit(manager: SyncManager, numbers: range, family: str) -> None:
    async with manager.session() as session, session.begin():
        for number in numbers:
            await session.merge(Patient(number=str(number), family=family))


async def discharge(manager: SyncManager, number: int) -> None:
    async with manager.session() as session, session.begin():
        await session.delete(await session.get_one(Patient, str(number)))


async def findings(manager: SyncManager) -> dict[str, Verdict]:
    return {each.name: each.verdict for each in await manager.diagnose()}


async def rewind(engine: AsyncEngine, through: int) -> None:
    """Behind the system's back: forget every event after a position, and give their positions again."""
    for table in ("outbox", "outbox_delivery"):
        await execute(engine, f"delete from {table} where event_id > :through", through=through)
    await execute(engine, "select setval('outbox_event_id_seq', :through)", through=through)


async def highest(engine: AsyncEngine) -> int:
    return int(await value(engine, "select last_value from outbox_event_id_seq"))


@asynccontextmanager
async def one(primary: AsyncEngine, events: int = 10) -> AsyncIterator[tuple[SyncManager, ScriptedSecondary]]:
    """A secondary that got so many events, of which the primary then forgets the later half."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary)
    await manager.register()
    for number in range(events):
        await write(manager, change(f"{number}"))
    await manager.relay().drain()
    await rewind(primary, events // 2)
    yield manager, secondary
    await manager.aclose()


def dump(postgres: PostgresServer, name: str, file: Path) -> None:
    _tool("pg_dump", "--format=custom", f"--file={file}", postgres.dsn(name, driver="postgresql"))


def restore(postgres: PostgresServer, file: Path, name: str) -> None:
    _tool("pg_restore", "--exit-on-error", f"--dbname={postgres.dsn(name, driver='postgresql')}", str(file))


def _tool(name: str, *arguments: str) -> None:
    program = find_binaries() / name
    if not program.exists():
        pytest.skip(f"this PostgreSQL came without {name}")
    subprocess.run([program, *arguments], check=True)


async def test_a_relay_carries_nothing_to_a_secondary_that_is_ahead_and_says_so(
    primary: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """C4: the event that reuses a position is not swallowed as stale, and the registry says why it waits."""
    async with one(primary) as (manager, secondary):
        await write(manager, change("9", 1))
        with caplog.at_level(logging.ERROR, "outbox.relay"):
            async with running(manager.relay()):
                await eventually(lambda: value(primary, "select beyond from outbox_secondary"))
                await eventually(lambda: pending(primary))
        assert [record.outbox_error_code for record in caplog.records] == ["ahead"]
        assert secondary.held["default", "Thing", "9"].content == '{"value":0}'
        assert (await pending(primary), await value(primary, "select sum(stale) from outbox_lag")) == (1, 0)
        (status,) = await manager.all_statuses()
        assert (status.beyond, status.reasons[0].split(":")[0]) == (10, "ahead")
        assert (await findings(manager))["ahead"] is Verdict.WRONG


async def test_positions_that_pass_by_themselves_do_not_end_it(primary: AsyncEngine) -> None:
    """C4: what was given twice stays in doubt until somebody has moved positions and compared."""
    async with one(primary) as (manager, secondary):
        await write(manager, change("new"))
        assert await manager.relay().drain() in (0, 1)
        for number in range(20):
            await write(manager, change(f"later-{number}"))
        assert await highest(primary) > 10
        calls = len(secondary.calls)
        assert await manager.relay().drain() == 0
        assert (len(secondary.calls), await pending(primary)) == (calls, 21)
        assert (await findings(manager))["ahead"] is Verdict.WRONG


async def test_the_others_are_carried_to(primary: AsyncEngine) -> None:
    """C4: only the one that is ahead is withheld."""
    ahead, level = ScriptedSecondary("ahead"), ScriptedSecondary("level")
    manager = manager_of(primary, ahead, level)
    await manager.register()
    await execute(primary, "select setval('outbox_event_id_seq', 100)")
    await write(manager, change("one"))
    await manager.relay().drain()
    level.held.clear()
    await rewind(primary, 50)
    async with running(manager.relay()):
        await write(manager, change("one", 2))
        await eventually(lambda: level.held)
    assert position_of(ahead.held["default", "Thing", "one"]) == 101
    assert (await pending(primary, "ahead"), await pending(primary, "level")) == (1, 0)


async def test_a_caller_who_waits_does_not_carry_to_it_either(primary: AsyncEngine) -> None:
    """C4: the hands of a caller obey the same, and he is told that it is still owed."""
    async with one(primary) as (manager, secondary):
        for _ in range(2):
            (status,) = await manager.sync(change("9", 1), backends=["search"], timeout=0.3)
            assert not status.synced
        assert secondary.held["default", "Thing", "9"].content == '{"value":0}'


async def test_a_caller_who_compared_long_ago_learns_it_from_the_registry(primary: AsyncEngine) -> None:
    """C4: somebody else found it out."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary)
    await manager.register()
    (status,) = await manager.sync(change("9"), backends=["search"], timeout=10)
    assert status.synced
    await execute(primary, "update outbox_secondary set beyond = 1000")
    (status,) = await manager.sync(change("9", 1), backends=["search"], timeout=0.3)
    assert (status.synced, len(secondary.calls)) == (False, 1)
    await manager.aclose()


async def test_positions_are_moved_past_it_and_new_writes_win(primary: AsyncEngine) -> None:
    """C4, repaired on request: a running relay goes on by itself."""
    async with one(primary) as (manager, secondary), running(manager.relay()):
        await write(manager, change("9", 1))
        await eventually(lambda: value(primary, "select beyond from outbox_secondary"))
        moved = await manager.move_past()
        assert (moved.before, moved.after, moved.ahead, moved.unasked) == (6, 11, ("search",), ())
        await write(manager, change("8", 2))
        await eventually(lambda: secondary.held["default", "Thing", "8"].content == '{"value":2}')
        assert position_of(secondary.held["default", "Thing", "8"]) == 12
        assert (await manager.all_statuses())[0].beyond is None
        assert (await findings(manager)) | {"ahead": Verdict.OK, "history": Verdict.WARNING} == await findings(manager)


async def test_moving_never_lowers_positions(primary: AsyncEngine) -> None:
    """C4: however far behind the secondaries are."""
    manager = manager_of(primary, ScriptedSecondary("search"))
    await manager.register()
    await execute(primary, "select setval('outbox_event_id_seq', 100)")
    moved = await manager.move_past()
    assert (moved.before, moved.after, moved.ahead) == (100, 100, ())
    assert await value(primary, "select nextval('outbox_event_id_seq')") == 101


async def test_a_fresh_sequence_is_left_as_it_is(primary: AsyncEngine) -> None:
    manager = manager_of(primary, ScriptedSecondary("search"))
    assert (await manager.move_past()).after == 0
    assert await value(primary, "select nextval('outbox_event_id_seq')") == 1


async def test_positions_are_moved_while_writers_write_and_none_is_given_twice(primary: AsyncEngine) -> None:
    """C4: moves and writes race; every position is another, and all those after a move are above it."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary)
    await manager.register()
    stop, given = asyncio.Event(), list[int]()

    async def draw() -> None:
        while not stop.is_set():
            given.append(int(await value(primary, "select nextval('outbox_event_id_seq')")))

    writers = [asyncio.create_task(draw()) for _ in range(3)]
    for step in range(1, 25):
        await eventually(lambda step=step: len(given) > 20 * step)
        secondary.held.clear()
        event = change("far")
        secondary.held[event.key] = msgspec.structs.replace(event, position=max(given) + step * 3)
        moved = await manager.move_past()
        assert moved.after >= moved.positions["search"]
    stop.set()
    await asyncio.gather(*writers)
    assert len(given) == len(set(given))


async def test_a_move_waits_for_whoever_drew_a_position(primary: AsyncEngine) -> None:
    """C4: what was drawn before it is known to it, and nothing is changed when that cannot be."""
    async with one(primary) as (manager, _):
        async with primary.begin() as writer:
            await writer.execute(text("select nextval('outbox_event_id_seq')"))
            with pytest.raises(DBAPIError) as refused:
                await manager.move_past()
            assert code_of(refused.value.orig) == "55P03"
        assert await highest(primary) == 6
        moved = await manager.move_past()
        assert (moved.before, moved.after, moved.ahead) == (6, 10, ("search",))
        assert (await findings(manager))["history"] is Verdict.WARNING


async def test_a_position_too_far_to_be_true_moves_nothing(primary: AsyncEngine) -> None:
    secondary = ScriptedSecondary("search")
    event = change("damaged")
    secondary.held[event.key] = msgspec.structs.replace(event, position=2**63 - 1)
    manager = manager_of(primary, secondary)
    await manager.register()
    with pytest.raises(SecondaryError, match="too far"):
        await manager.move_past()
    assert await value(primary, "select nextval('outbox_event_id_seq')") == 1


async def test_one_that_does_not_answer_is_asked_before_it_is_carried_to(primary: AsyncEngine) -> None:
    """C4: an outage hides nothing; the probe that finds it back asks first how far it is."""

    class Dumb(ScriptedSecondary):
        dumb = True

        async def highest_position(self) -> int:
            if self.dumb:
                raise Unavailable("refused", "nobody there")
            return await super().highest_position()

    secondary = Dumb("search")
    secondary.dumb = False
    manager = manager_of(primary, secondary)
    await manager.register()
    for number in range(10):
        await write(manager, change(f"{number}"))
    await manager.relay().drain()
    await rewind(primary, 5)
    secondary.dumb, calls = True, len(secondary.calls)
    async with running(manager.relay()):
        await write(manager, change("9", 1))
        assert (await manager.move_past()).unasked == ("search",)
        await eventually(lambda: value(primary, "select breaker = 'open' from outbox_secondary"))
        secondary.dumb = False
        await eventually(lambda: value(primary, "select beyond from outbox_secondary"))
    assert len(secondary.calls) == calls


async def test_a_restored_dump_is_found_and_made_equal_again(
    postgres: PostgresServer, template: str, directory: Path
) -> None:
    """C4 and S5, end to end: dump, go on, restore, and everything the lost history left behind is repaired."""
    secondary = ScriptedSecondary("mirror")
    with new_database(postgres, template) as name:
        engine = create_async_engine(postgres.dsn(name), poolclass=NullPool)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        manager = hospital(engine, secondary)
        await manager.register()
        await admit(manager, range(40), "Chalmers")
        await manager.relay().drain()
        assert (await manager.reconcile("mirror")).in_sync
        dump(postgres, name, directory / "dump")
        # The history that will be lost: newer, new, and gone.
        await admit(manager, range(5), "Lost")
        await admit(manager, range(100, 101), "Lost")
        await discharge(manager, 39)
        await manager.relay().drain()
        await manager.aclose()
        await engine.dispose()
    with new_database(postgres) as name:
        restore(postgres, directory / "dump", name)
        engine = create_async_engine(postgres.dsn(name), poolclass=NullPool)
        await _go_on(hospital(engine, secondary), secondary)
        await engine.dispose()


async def _go_on(manager: SyncManager, secondary: ScriptedSecondary) -> None:
    assert (await findings(manager))["ahead"] is Verdict.WRONG
    async with running(manager.relay()):
        await admit(manager, range(3), "Windsor")
        await eventually(lambda: value(manager.engine, "select beyond from outbox_secondary"))
        moved = await manager.move_past()
        assert moved.after > moved.before
        assert (await findings(manager))["history"] is Verdict.WARNING
        await eventually(lambda: nothing_owed(manager.engine))
        found = await manager.reconcile("mirror", repair=True)
        # Those written since the restore, 0, 1 and 2, arrived; 3, 4 and 100 hold what is lost, and 39 is not there.
        assert found.repaired == 4, found
        await eventually(lambda: nothing_owed(manager.engine))
    assert (await manager.reconcile("mirror")).in_sync
    assert (await findings(manager))["history"] is Verdict.OK
    assert secondary.content_of("Patient", "100") is None
    assert secondary.content_of("Patient", "0") == '{"number":"0","family":"Windsor"}'
    assert secondary.content_of("Patient", "39") == '{"number":"39","family":"Chalmers"}'
    await manager.aclose()


async def nothing_owed(engine: AsyncEngine) -> bool:
    return await pending(engine) == 0
