"""The continuous proof: relays compare in the background, one at a time, slowly, and status says since when."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox import MemorySecondary, SyncManager
from outbox.errors import Unavailable
from outbox.finding import Verdict
from outbox.proof import Proof
from tests.relaying import change, execute, manager_of, rows, running, value, write
from tests.waiting import eventually


class Base(DeclarativeBase): ...


class Patient(Base):
    __tablename__ = "patient"
    number: Mapped[str] = mapped_column(primary_key=True)
    family: Mapped[str]


class Gone(MemorySecondary):
    """Cannot be listed."""

    async def find(self, *_: Any) -> Any:
        raise Unavailable("refused", "")

    async def summarise(self, *_: Any) -> Any:
        raise Unavailable("refused", "")


class Silent(MemorySecondary):
    """Never answers the first time."""

    asked = 0

    async def summarise(self, *args: Any) -> Any:
        self.asked += 1
        if self.asked == 1:
            await asyncio.Event().wait()
        return await super().summarise(*args)


class Panic(BaseException):
    """As a Rust extension raises: no `Exception`."""


class Broken(MemorySecondary):
    """Carries, and raises something of its own when it is compared."""

    raises: BaseException

    async def summarise(self, *_: Any) -> Any:
        raise self.raises


SOON = {"proof_interval": 0.2, "proof_share": 1.0}


async def tracked(primary: AsyncEngine, *secondaries: MemorySecondary, **settings: Any) -> SyncManager:
    async with primary.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    manager = manager_of(primary, *secondaries, **(SOON | settings))
    manager.track(Patient)
    await manager.register()
    async with manager.session() as session, session.begin():
        session.add_all([Patient(number=str(number), family="Chalmers") for number in range(50)])
    await manager.relay().drain()
    return manager


async def test_a_relay_proves_and_status_says_since_when(primary: AsyncEngine) -> None:
    manager = await tracked(primary, MemorySecondary("mirror"))
    assert (await manager.backend_status("mirror")).checked is None
    async with running(manager.relay()):
        await eventually(lambda: value(primary, "select count(*) > 0 from outbox_reconciliation"))
    checked = (await manager.backend_status("mirror")).checked
    assert checked is not None
    assert (checked.resources, checked.left, checked.repaired) == (50, 0, 0)
    assert (await manager.health()).ok
    noted = await rows(primary, "select actor, reason, repair, high_water from outbox_reconciliation limit 1")
    assert noted == [{"actor": "relay", "reason": "continuous proof", "repair": False, "high_water": 50}]


async def test_drift_is_told_and_makes_unhealthy_until_it_is_repaired(
    primary: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """It repairs nothing by itself: what changed a secondary behind our back should be known first."""
    secondary = MemorySecondary("mirror")
    manager = await tracked(primary, secondary)
    del secondary.held["default", "Patient", "7"]
    with caplog.at_level(logging.INFO, logger="outbox.proof"):
        async with running(manager.relay()):
            await eventually(lambda: value(primary, "select count(*) > 0 from outbox_reconciliation"))
            assert "drift: 1 resources differed when last compared" in (await manager.health()).reasons[0]
            (finding,) = (each for each in await manager.diagnose() if each.name == "drift")
            assert (finding.verdict, "reconcile" in finding.advice) == (Verdict.WRONG, True)
            assert ("default", "Patient", "7") not in secondary.held
            await manager.reconcile("mirror", repair=True)
            await eventually(lambda: ("default", "Patient", "7") in secondary.held)
            seen = await value(primary, "select max(run_id) from outbox_reconciliation")
            await eventually(lambda: value(primary, f"select max(run_id) > {seen + 1} from outbox_reconciliation"))
        assert (await manager.health()).ok
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "mirror: compared 50 resources: 1 missing, 0 extra, 0 stale, 0 altered" in warned[0].getMessage()
    assert vars(warned[0])["outbox_backend_id"] == "mirror"


async def test_of_many_relays_one_compares(primary: AsyncEngine) -> None:
    manager = await tracked(primary, MemorySecondary("mirror"), proof_interval=3600)
    await execute(primary, "update outbox_secondary set registered_at = now() - interval '2 hours'")
    (registration,) = manager.registrations
    proofs = [Proof(primary, [registration], manager.config, manager.tracking) for _ in range(4)]
    for proof in proofs:
        await proof.prove_if_due(registration)
    assert await value(primary, "select count(*) from outbox_reconciliation") == 1


@pytest.mark.parametrize("status", ["paused", "shadow"])
async def test_who_is_not_live_is_let_be(primary: AsyncEngine, status: str) -> None:
    manager = await tracked(primary, MemorySecondary("mirror"), proof_interval=0.01)
    await execute(primary, f"update outbox_secondary set status = '{status}'")
    (registration,) = manager.registrations
    await Proof(primary, [registration], manager.config, manager.tracking).prove_if_due(registration)
    assert await value(primary, "select count(*) from outbox_reconciliation") == 0


async def test_a_secondary_that_cannot_be_listed_is_told_and_the_others_are_compared(
    primary: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """A failed comparison is never taken for an equal one."""
    manager = await tracked(primary, Gone("away"), MemorySecondary("mirror"))
    with caplog.at_level(logging.INFO, logger="outbox.proof"):
        async with running(manager.relay()):
            await eventually(lambda: value(primary, "select count(*) > 1 from outbox_reconciliation"))
    assert await rows(primary, "select distinct backend_id from outbox_reconciliation") == [{"backend_id": "mirror"}]
    assert (await manager.backend_status("away")).checked is None
    assert "away: not compared, as it is unavailable (refused)" in [each.getMessage() for each in caplog.records]


@pytest.mark.parametrize(
    "error",
    [sqlite3.OperationalError("canary"), Panic("canary"), asyncio.CancelledError("canary")],
    ids=["error", "panic", "cancellation"],
)
async def test_what_an_adapter_raises_ends_neither_the_proof_nor_the_relay(
    primary: AsyncEngine, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    """Guarantee 7: the others are compared and carried to; 14: its type is told, and not its text."""
    broken, mirror = Broken("broken"), MemorySecondary("mirror")
    broken.raises = error
    manager = await tracked(primary, broken, mirror)
    words = f"broken: comparing failed ({type(error).__name__})"
    with caplog.at_level(logging.INFO, logger="outbox.proof"):
        async with running(manager.relay()):
            await eventually(lambda: [each.getMessage() for each in caplog.records].count(words) > 1)
            await eventually(lambda: value(primary, "select count(*) > 1 from outbox_reconciliation"))
            await write(manager, change("late"))
            await eventually(lambda: all(("default", "Thing", "late") in each.held for each in (broken, mirror)))
    assert "canary" not in caplog.text
    assert await rows(primary, "select distinct backend_id from outbox_reconciliation") == [{"backend_id": "mirror"}]


async def test_what_a_content_raises_ends_no_relay(primary: AsyncEngine, caplog: pytest.LogCaptureFixture) -> None:
    """Guarantee 7: it comes again, and is told, until somebody mends it."""
    manager = await tracked(primary, MemorySecondary("mirror"))
    failing = manager_of(primary, *manager.registrations, **SOON)
    failing.track(Patient, content=lambda patient: {"ward": {}[patient.number]})
    async with running(failing.relay()):
        await eventually(lambda: "mirror: comparing failed (KeyError)" in caplog.text)
        await write(failing, change("late"))
        await eventually(lambda: value(primary, "select count(*) = 0 from outbox_delivery"))


async def test_a_comparison_that_is_cancelled_is_no_failure(
    primary: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Who stops a relay is not held up by what it compares."""
    secondary = Silent("mirror")
    manager = await tracked(primary, secondary, proof_interval=0.001)
    proof = Proof(primary, manager.registrations, manager.config, manager.tracking)
    comparing = asyncio.create_task(proof.prove_if_due(manager.registrations[0]))
    await eventually(lambda: secondary.asked)
    comparing.cancel()
    await asyncio.wait([comparing], timeout=5)
    assert comparing.cancelled()
    assert caplog.text == ""


async def test_where_it_stands_is_written_down_and_another_relay_goes_on_there(
    primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R8: a comparison that takes longer than a relay lives comes to its end all the same."""
    monkeypatch.setattr("outbox.reconcile._TELL_EVERY", 0.0)
    monkeypatch.setattr("outbox.source._PAGE", 10)
    secondary = MemorySecondary("mirror")
    manager = await tracked(primary, secondary, proof_interval=0.01)
    for name in ("11", "7"):
        del secondary.held["default", "Patient", name]
    (registration,) = manager.registrations
    first = Proof(primary, [registration], manager.config, manager.tracking)
    monkeypatch.setattr(first, "_pause", Killed(after=3))
    with pytest.raises(asyncio.CancelledError):
        await first.prove(registration)
    standing = await value(primary, "select cast(proof_standing as text) from outbox_secondary")
    assert json.loads(standing)["result"]["primary_count"] in (20, 30)
    assert json.loads(standing)["result"]["missing"] == 1
    second = Proof(primary, [registration], manager.config, manager.tracking)
    await second.prove_if_due(registration)
    assert await value(primary, "select count(*) from outbox_reconciliation") == 0, "its relay may still be at it"
    await execute(primary, "update outbox_secondary set proof_at = proof_at - interval '11 minutes'")
    asked = list[str | None]()
    summarise = secondary.summarise

    async def noted(tenant: str, kind: str, after: str | None, through: str | None) -> Any:
        asked.append(after)
        return await summarise(tenant, kind, after, through)

    monkeypatch.setattr(secondary, "summarise", noted)
    await second.prove_if_due(registration)
    assert asked[0] == json.loads(standing)["after"]
    checked = (await manager.backend_status("mirror")).checked
    assert checked is not None
    assert (checked.resources, checked.missing) == (50, 2)
    assert await value(primary, "select proof_standing is null from outbox_secondary")


class Killed:
    """A pause during which the process ends, the third time or so."""

    def __init__(self, after: int) -> None:
        self._left = after

    async def __call__(self, _: object) -> None:
        self._left -= 1
        if self._left == 0:
            raise asyncio.CancelledError


async def test_it_keeps_to_its_share_of_the_time(primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is proportional to the work, so that a slower machine is left alone for longer."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    manager = await tracked(primary, MemorySecondary("mirror"), proof_share=0.1)
    proof = Proof(primary, manager.registrations, manager.config, manager.tracking)
    monkeypatch.setattr("outbox.proof.asyncio.sleep", sleep)
    for worked in (100.0, 10.0):
        proof._resumed_at = time.monotonic() - worked
        async with asyncio.timeout(None) as limit:
            await proof._pause(limit)
    assert slept == [pytest.approx(900, rel=0.1), pytest.approx(90, rel=0.1)]


async def test_a_page_that_never_comes_is_not_the_last(primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a network that swallows everything, on either side."""
    monkeypatch.setattr("outbox.proof._PATIENCE", timedelta(seconds=0.5))
    manager = await tracked(primary, Silent("mirror"))
    async with running(manager.relay()):
        await eventually(lambda: _checked(manager))


async def _checked(manager: SyncManager) -> bool:
    return (await manager.backend_status("mirror")).checked is not None


@pytest.mark.parametrize("settings", [{"proof_interval": None}, SOON])
async def test_without_an_interval_or_tracked_classes_a_relay_carries_and_compares_nothing(
    primary: AsyncEngine, settings: dict[str, Any]
) -> None:
    secondary = MemorySecondary("mirror")
    manager = manager_of(primary, secondary, **settings)
    await manager.register()
    async with running(manager.relay()):
        await write(manager, change("1"))
        await eventually(lambda: secondary.held)
    assert await value(primary, "select proof_at is null from outbox_secondary")


async def test_notes_that_repaired_nothing_are_pruned_and_the_latest_kept(primary: AsyncEngine) -> None:
    await tracked(primary, MemorySecondary("mirror"), keep_attempts=0.05, prune_interval=0.05)
    insert = """
        insert into outbox_reconciliation (backend_id, tenant_id, repair, actor, reason, high_water, primary_count,
            secondary_count, missing, extra, stale, altered, in_flight, repaired, refused, started_at, finished_at)
        values ('mirror', :tenant, false, '', '', 0, 0, 0, 0, 0, 0, 0, 0, :repaired, 0, now(), :at)"""
    at = await value(primary, "select now()")
    for days, repaired, tenant in ((4, 0, None), (3, 1, None), (2, 0, "north"), (1, 0, None)):
        await execute(primary, insert, at=at - timedelta(days=days), repaired=repaired, tenant=tenant)
    async with running(manager_of(primary, MemorySecondary("mirror"), keep_attempts=0.05, prune_interval=0.05).relay()):
        await eventually(lambda: value(primary, "select count(*) = 2 from outbox_reconciliation"))
    kept = await rows(primary, "select repaired from outbox_reconciliation order by finished_at")
    assert [row["repaired"] for row in kept] == [1, 0]
