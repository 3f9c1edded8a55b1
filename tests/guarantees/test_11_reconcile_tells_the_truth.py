"""Guarantee 11, first form: reconcile finds what differs, reports nothing falsely, repairs through the outbox only."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta

import msgspec
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox import MemorySecondary, Outcome, ReconciliationResult, SyncConfig, SyncEvent, SyncManager
from outbox.errors import SettingsError
from tests.relaying import manager_of
from tests.waiting import eventually


class Base(DeclarativeBase): ...


class Patient(Base):
    __tablename__ = "patient"
    tenant_id: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[str] = mapped_column(primary_key=True)
    family: Mapped[str]


class Slow(MemorySecondary):
    """Takes its time, so that deliveries are under way while reconcile looks."""

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        await asyncio.sleep(0.02)
        return await super().apply(batch)


class World:
    def __init__(self, engine: AsyncEngine, secondary: MemorySecondary) -> None:
        self.secondary = secondary
        self.engine = engine
        self.manager = SyncManager(engine, [secondary], config=SyncConfig(batch_size=20))
        self.manager.track(
            Patient,
            tenant=Patient.tenant_id,
            resource_id=Patient.number,
            content=lambda patient: {"number": patient.number, "family": patient.family},
        )

    async def write(self, numbers: Sequence[int], family: str, tenant: str = "north") -> None:
        async with self.manager.session() as session, session.begin():
            for number in numbers:
                await session.merge(Patient(tenant_id=tenant, number=str(number), family=family))

    def alter(self, number: int, **changes: object) -> None:
        key = ("north", "Patient", str(number))
        self.secondary.held[key] = msgspec.structs.replace(self.secondary.held[key], **changes)

    def lose(self, number: int) -> None:
        del self.secondary.held["north", "Patient", str(number)]

    def invent(self, number: int) -> None:
        event = SyncEvent.create("Patient", str(number), {"family": "nobody"}, tenant_id="north")
        self.secondary.held[event.key] = msgspec.structs.replace(event, position=1)


@pytest.fixture
async def world(primary: AsyncEngine) -> World:
    async with primary.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    world = World(primary, Slow("mirror"))
    await world.manager.register()
    await world.write(range(100), "Chalmers")
    await world.write(range(50), "Windsor", tenant="south")
    await world.manager.relay().drain()
    return world


async def test_equal_sides_show_no_drift(world: World) -> None:
    found = await world.manager.reconcile("mirror")
    assert found.in_sync
    assert (found.primary_count, found.secondary_count) == (150, 150)


async def test_a_type_that_nobody_tracks_is_refused_and_not_called_equal(world: World) -> None:
    with pytest.raises(SettingsError, match=r"'Patent' is not tracked; tracked are Patient"):
        await world.manager.reconcile("mirror", resource_type="Patent")


async def test_what_another_was_given_again_makes_nobody_stale(world: World) -> None:
    """R5: the repair of one secondary says the same once more, above what the others hold."""
    await world.write([5], "Changed")
    await world.manager.relay().drain()
    other = manager_of(world.engine, MemorySecondary("other"))
    await other.register()
    world.manager.registrations.append(other.registrations[0])
    assert (await world.manager.reconcile("other", repair=True)).missing > 0
    world.alter(5, content='{"family":"Forged","number":"5"}')
    found = await world.manager.reconcile("mirror")
    assert [drift.kind for drift in found.samples] == ["altered"]
    world.alter(5, content='{"family":"Chalmers","number":"5"}', position=1)
    found = await world.manager.reconcile("mirror")
    assert [drift.kind for drift in found.samples] == ["stale"]


async def test_every_kind_of_drift_is_found_named_repaired_and_then_gone(world: World) -> None:
    world.lose(3)
    world.invent(777)
    world.alter(5, content='{"family":"Forged","number":"5"}')
    await world.write([8], "Newer")
    await world.manager.relay().drain()
    world.alter(8, content='{"family":"Chalmers","number":"8"}', position=1)

    found = await world.manager.reconcile("mirror")
    assert {drift.kind: drift.resource_id for drift in found.samples} == {
        "missing": "3",
        "extra": "777",
        "altered": "5",
        "stale": "8",
    }
    assert (found.missing, found.extra, found.stale, found.altered) == (1, 1, 1, 1)
    assert found.repaired == 0, "a dry run records nothing"
    assert (await world.manager.backend_status("mirror")).pending == 0

    repaired = await world.manager.reconcile("mirror", repair=True)
    assert repaired.repaired == 4
    assert world.secondary.content_of("Patient", "777", tenant_id="north"), "repair itself writes to no secondary"
    await world.manager.relay().drain()
    assert (await world.manager.reconcile("mirror")).in_sync
    assert world.secondary.content_of("Patient", "777", tenant_id="north") is None


async def test_nothing_is_reported_falsely_while_writes_go_on(world: World) -> None:
    """R4: normal lag is not drift."""
    relay = world.manager.relay()
    relaying = asyncio.create_task(relay.run())
    writing = asyncio.create_task(_write_on(world))
    reports: list[ReconciliationResult] = []
    while len(reports) < 50 and (len(reports) < 5 or not any(report.in_flight for report in reports)):
        reports.append(await world.manager.reconcile("mirror", patience=timedelta(seconds=2)))
    writing.cancel()
    relay.stop()
    await relaying
    assert [report.samples for report in reports if not report.in_sync] == []
    assert sum(report.in_flight for report in reports) > 0, "the load never got in the way, so nothing was shown"


async def _write_on(world: World) -> None:
    turn = 0
    while True:
        turn += 1
        await world.write([turn * 7 % 100, turn * 13 % 100], f"family-{turn}")


async def test_what_lies_behind_a_dead_key_is_not_reported_as_drift_but_as_in_flight(world: World) -> None:
    async with world.engine.begin() as connection:
        await connection.execute(
            text(
                "insert into outbox_hold (backend_id, tenant_id, resource_type, resource_id, key_hash, event_ids,"
                " oldest_id, owed_since, state) values ('mirror', 'north', 'Patient', '9',"
                " hashtextextended('north/Patient/9', 0), '{1}', 1, now(), 'dead')"
            )
        )
    world.lose(9)
    found = await world.manager.reconcile("mirror", patience=timedelta(milliseconds=100))
    assert (found.in_sync, found.in_flight) == (True, 1)


async def test_a_wrong_listing_of_the_primary_empties_no_secondary(world: World) -> None:
    """R10: too many extras are left alone and counted."""
    async with world.engine.begin() as connection:
        await connection.execute(text("delete from patient where tenant_id = 'north' and number < '5'"))
    found = await world.manager.reconcile("mirror", repair=True)
    assert found.extra > 10
    assert (found.refused, found.repaired) == (found.extra, 0)


async def test_an_insert_under_way_is_never_overtaken_by_the_delete_of_an_extra(world: World) -> None:
    """R3: the delete's position is drawn, then everybody who might have drawn a lower one is waited for."""
    world.invent(888)
    async with world.manager.session() as session:
        await session.begin()
        session.add(Patient(tenant_id="north", number="888", family="Late"))
        await session.flush()
        repairing = asyncio.create_task(world.manager.reconcile("mirror", repair=True))
        await eventually(lambda: repairing.done() or _waiting_for_others(world.engine))
        assert not repairing.done(), repairing.result()
        await session.commit()
    assert (await repairing).repaired == 0
    await world.manager.relay().drain()
    assert "Late" in (world.secondary.content_of("Patient", "888", tenant_id="north") or "")


async def _waiting_for_others(engine: AsyncEngine) -> bool:
    """Whether the delete has drawn its position too: two transactions have recorded something."""
    async with engine.connect() as connection:
        recorded = "select count(*) from pg_locks where mode = 'RowExclusiveLock' and relation = to_regclass('outbox')"
        return bool(await connection.scalar(text(recorded)) == 2)
