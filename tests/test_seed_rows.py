"""What the seed got wrong and no other test holds: the rows of docs/seed.md that have theirs here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox import MemorySecondary, ResourceDigest, SettingsError, SyncConfig, SyncEvent, SyncManager, Unavailable
from outbox.config import manager_from_config
from outbox.schema import metadata
from outbox.secondaries.base import Retry, Summary
from outbox.turn import take_turn
from tests.relaying import change, execute, hold_of, manager_of, pending, raw, rows, running, value, write
from tests.scripted import CheckedSecondary, ScriptedSecondary
from tests.waiting import eventually


async def owed(engine: AsyncEngine, backend_id: str, deliveries: int) -> bool:
    return await pending(engine, backend_id) == deliveries


# Durability


class Panic(BaseException):
    """No `Exception`, as a panic of an extension written in Rust is none."""


@pytest.mark.parametrize("error", [Panic("at 4711"), asyncio.CancelledError("at 4711")], ids=["panic", "cancelled"])
async def test_a_panic_in_an_adapter_is_that_event_s_failure_and_ends_no_loop(
    primary: AsyncEngine, error: BaseException
) -> None:
    """Seed D6: the event fails alone, its batch and the other secondary go on, the relay never ended."""
    secondary, other = ScriptedSecondary("search"), ScriptedSecondary("other")
    manager = manager_of(primary, secondary, other)
    await manager.register()
    secondary.always("bad", error)
    async with running(manager.relay()) as (relaying,):
        await write(manager, *(change(str(number)) for number in range(20)), change("bad"))
        await eventually(lambda: len(secondary.held) == 20 and len(other.held) == 21)
        await eventually(lambda: hold_of(primary, "bad"))
        await write(manager, change("later"))
        await eventually(lambda: len(secondary.held) == 21 and len(other.held) == 22)
        assert not relaying.done()
        assert (await manager.health()).process.ok
        hold = await eventually(lambda: hold_of(primary, "bad"))
        assert (hold["state"], hold["error_code"], "4711" in hold["error"]) == ("retrying", "adapter_error", False)


async def test_a_panic_of_a_check_means_unavailable(primary: AsyncEngine) -> None:
    """Seed D6: what is asked after a timeout may panic too."""
    secondary = CheckedSecondary("search")
    secondary.unreachable = Panic()  # type: ignore[assignment]
    manager = manager_of(primary, secondary, lease=1.2, attempt_deadline=0.45, breaker_initial=30, breaker_max=30)
    await manager.register()
    secondary.hang()
    await write(manager, change("1"))
    assert await manager.relay().run_once("search") == 1
    hold = await hold_of(primary, "1")
    assert hold is not None
    assert (hold["state"], hold["attempts"], secondary.checks) == ("released", 0, 1)


async def test_nothing_that_goes_on_behind_holds_up_a_writer(primary: AsyncEngine) -> None:
    """Seed D7: a secondary that hangs, a backlog, a relay stuck inside its claim; to write is still one insert."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, batch_size=2, attempts_in_flight=1, lease=60, unhealthy_pending=100)
    await manager.register()
    secondary.hang()
    async with running(manager.relay()), raw(primary) as stuck:
        await write(manager, *(change(str(number)) for number in range(150)))
        await eventually(lambda: secondary.running)
        async with stuck.transaction():
            await eventually(lambda: take_turn(stuck, "public", "search"))
            async with manager.session() as session, session.begin():
                # Whoever had to wait for anything would fail.
                await session.execute(text("set local lock_timeout = '100ms'"))
                session.record(change(f"more-{number}") for number in range(1_500))
        assert await owed(primary, "search", 1_650)
        # What there is instead of a writer that hangs: everybody can see it.
        assert (await manager.backend_status("search")).reasons == ("pending 1,650 is above 100",)
        secondary.release()


# Retry and failure handling


async def test_what_is_owed_to_a_secondary_that_no_relay_knows_waits_in_sight(primary: AsyncEngine) -> None:
    """Seed D29, D30, D32, U8: counted, a reason to be unhealthy, failed by nobody; carried by the first who knows."""
    here, elsewhere = ScriptedSecondary("here"), ScriptedSecondary("elsewhere")
    manager = manager_of(primary, here, unhealthy_after_silence=0.6)
    await manager_of(primary, here, elsewhere).register()
    async with running(manager.relay()):
        await write(manager, *(change(str(number)) for number in range(10)))
        await eventually(lambda: len(here.held) == 10)
        await eventually(lambda: _silent(manager, "elsewhere"))
        status = await manager.backend_status("elsewhere")
        assert (status.pending, status.failing, status.dead, status.total_errors) == (10, 0, 0, 0)
        assert not (await manager.backend_status("here")).reasons
        async with running(manager_of(primary, elsewhere).relay()):
            await eventually(lambda: len(elsewhere.held) == 10)
            await eventually(lambda: owed(primary, "elsewhere", 0))
    assert elsewhere.sent == sorted(here.sent)


async def _silent(manager: SyncManager, backend_id: str) -> bool:
    reasons = (await manager.backend_status(backend_id)).reasons
    return [reason.split(":")[0] for reason in reasons] == ["silence"]


async def test_a_relay_started_twice_and_others_beside_it_carry_everything_once(primary: AsyncEngine) -> None:
    """Seed D31: starting replaces nothing and drops nothing, however often it is done, and with work in hand."""
    secondary = ScriptedSecondary("search")
    manager, other = (manager_of(primary, secondary, batch_size=7, attempts_in_flight=4, lease=0.6) for _ in range(2))
    await manager.register()
    relay = manager.relay()
    secondary.hang()
    async with running(relay):
        await write(manager, *(change(f"{number}") for number in range(100)))
        await eventually(lambda: len(secondary.running) == 4)
        async with running(manager.relay(), other.relay()):
            again = asyncio.create_task(relay.run())
            kept = (
                "select bool_and(lease_until > started_at + interval '2 s') from outbox_attempt where attempt_id <= 4"
            )
            await eventually(lambda: value(primary, kept))
            secondary.release()
            await eventually(lambda: owed(primary, "search", 0))
    await again
    assert len(secondary.sent) == len(set(secondary.sent)) == 100
    assert await value(primary, "select sum(lost) from outbox_attempt") == 0


REFUSED = [
    ("batch_size", 0),
    ("batch_size", -1),
    ("batch_size", 10**9),
    ("retry_multiplier", -2.0),
    ("retry_multiplier", 0.5),
    ("retry_multiplier", float("nan")),
    ("retry_multiplier", float("inf")),
    ("retry_multiplier", 1e300),
    ("retry_initial", 0),
    ("retry_initial", -1),
    ("retry_max", 0.001),
    ("max_attempts", 0),
    ("mode", "sometimes"),
    ("max_read_lag", -1),
]


@pytest.mark.parametrize("source", ["code", "environment", "file"])
@pytest.mark.parametrize(("field", "given"), REFUSED)
def test_settings_that_cannot_work_are_refused_on_load_wherever_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, field: str, given: Any
) -> None:
    """Seed D28, D33-D35, check 20: by the field's name, before anything runs. That `retry_max` is below the first."""
    path = tmp_path / "outbox.toml"
    path.write_text("dsn = 'postgresql://b/c'\n[outbox]\n" + (f"{field} = {_toml(given)}" if source == "file" else ""))
    if source == "environment":
        monkeypatch.setenv(f"OUTBOX_{field.upper()}", str(given))
    load = partial(SyncConfig, **{field: given}) if source == "code" else partial(manager_from_config, path)
    with pytest.raises(SettingsError) as refused:
        load()
    assert refused.value.field == field


def _toml(given: Any) -> str:
    return f"'{given}'" if isinstance(given, str) else str(given)


async def test_an_event_that_no_relay_can_read_ends_dead_and_the_rest_goes_on(primary: AsyncEngine) -> None:
    """Seed U4, check 15: the table refuses it; got in all the same, it is tried like any and stops nobody."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, batch_size=1, max_attempts=2)
    await manager.register()
    await write(manager, change("odd"))
    with pytest.raises(IntegrityError, match="outbox_operation_known"):
        await execute(primary, "update outbox set operation = 'merge'")
    await execute(primary, "alter table outbox drop constraint outbox_operation_known")
    await execute(primary, "update outbox set operation = 'merge'")
    await write(manager, *(change(str(number)) for number in range(5)))
    async with running(manager.relay()):
        await eventually(lambda: len(secondary.held) == 5)
        await eventually(lambda: _dead(primary, "odd"))
    hold = await hold_of(primary, "odd")
    assert hold is not None
    assert (hold["attempts"], hold["error_code"], secondary.sent_to("odd")) == (2, "unknown_operation", [])


async def _dead(primary: AsyncEngine, resource_id: str) -> bool:
    hold = await hold_of(primary, resource_id)
    return hold is not None and hold["state"] == "dead"


# The event


@pytest.mark.parametrize("event", [change("1"), SyncEvent.delete("Thing", "1", version=7, fhir_version="5.0")])
async def test_an_event_is_the_same_one_with_its_number_and_times_however_often_it_is_sent(
    primary: AsyncEngine, event: SyncEvent
) -> None:
    """Seed D21, D22: position and time are the database's and stay; it goes through a serializer as it is."""
    sent: list[SyncEvent] = []
    secondary = ScriptedSecondary("search")
    secondary.note = _into(sent)  # type: ignore[method-assign]
    secondary.script("1", Retry("busy"))
    manager = manager_of(primary, secondary)
    await manager.register()
    await write(manager, event)
    await manager.relay().run_once("search")
    failed = await hold_of(primary, "1")
    await eventually(lambda: manager.relay().run_once("search"))
    (stored,) = await rows(primary, "select event_id, created_at, version, fhir_version from outbox")
    assert failed is not None
    assert stored["created_at"] <= failed["first_failed_at"]
    first, second = sent
    assert first == second
    carried = (first.position, first.created_at, first.version, first.fhir_version)
    assert carried == tuple(stored.values())
    assert (first.version, first.fhir_version) == (event.version, event.fhir_version)
    assert msgspec.json.decode(msgspec.json.encode(first), type=SyncEvent) == first


def _into(sent: list[SyncEvent]) -> Any:
    async def note(events: list[SyncEvent]) -> None:
        sent.extend(events)

    return note


# Reconciliation


class Base(DeclarativeBase): ...


class Note(Base):
    __tablename__ = "note"
    id: Mapped[str] = mapped_column(primary_key=True)
    title: Mapped[str]


class Mirror(MemorySecondary):
    """Its listing breaks off where it is told to."""

    breaks_after: int | None = None

    async def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> AsyncIterator[ResourceDigest]:
        count = 0
        async for digest in super().scan(tenant_id, resource_type, after):
            if count == self.breaks_after:
                raise Unavailable("refused", "gone in the middle")
            count += 1
            yield digest

    async def summarise(self, tenant_id: str, resource_type: str, after: str | None, through: str | None) -> Summary:
        if self.breaks_after is not None and after is not None:
            raise Unavailable("refused", "gone in the middle")
        return await super().summarise(tenant_id, resource_type, after, through)


@pytest.fixture
async def mirrored(primary: AsyncEngine) -> tuple[SyncManager, Mirror]:
    """Three pages of notes, on both sides."""
    mirror = Mirror("mirror")
    manager = manager_of(primary, mirror)
    manager.track(Note, resource_id=Note.id, content=_content_of)
    async with primary.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await manager.register()
    async with manager.session() as session, session.begin():
        session.add_all(Note(id=f"{number:03d}", title="as written") for number in range(450))
    await manager.relay().drain()
    return manager, mirror


def _content_of(note: Note) -> dict[str, str]:
    if note.title == "unreadable":
        raise OSError("this row cannot be read")
    return {"id": note.id, "title": note.title}


async def test_counts_of_a_comparison_are_exact_and_its_samples_few(mirrored: tuple[SyncManager, Mirror]) -> None:
    """Seed D62, D63: each kind by itself, ten samples of each however many there are, and the direction is told."""
    manager, mirror = mirrored
    for number in range(0, 300, 10):
        del mirror.held["default", "Note", f"{number:03d}"]
    for number in range(12):
        event = SyncEvent.create("Note", f"extra-{number}", {})
        mirror.held[event.key] = msgspec.structs.replace(event, position=1)
    found = await manager.reconcile("mirror")
    assert (found.primary_count, found.secondary_count) == (450, 432)
    assert (found.missing, found.extra, found.stale, found.altered) == (30, 12, 0, 0)
    assert [drift.kind for drift in found.samples].count("missing") == 10
    assert len(found.samples) == 20


@pytest.mark.parametrize("side", ["secondary", "primary"])
async def test_a_read_that_fails_during_a_repair_deletes_nothing(
    primary: AsyncEngine, mirrored: tuple[SyncManager, Mirror], side: str
) -> None:
    """Seed 4.2, check 21: a listing that breaks off in its third page is an error, and no reason to write anything."""
    manager, mirror = mirrored
    before = await value(primary, "select max(event_id) from outbox")
    if side == "secondary":
        mirror.breaks_after = 420
    else:
        await execute(primary, "update note set title = 'unreadable' where id = '420'")
    with pytest.raises((Unavailable, OSError)):
        await manager.reconcile("mirror", repair=True)
    assert await value(primary, "select max(event_id) from outbox") == before
    assert len([digest async for digest in MemorySecondary.scan(mirror, "default", "Note")]) == 450


# Security


OURS = ", ".join(sorted(metadata("public").tables))
RIGHTS = [f"grant select, insert, update, delete on {OURS}", "grant usage, select on all sequences in schema public"]


async def test_a_relay_needs_rights_on_our_tables_and_on_nothing_else(
    primary: AsyncEngine, mirrored: tuple[SyncManager, Mirror]
) -> None:
    """Seed D67: least privilege; it never reads what the business wrote, so it need not be allowed to."""
    manager, mirror = mirrored
    role = f"outbox_relay_{uuid4().hex[:12]}"
    await execute(primary, f"create role {role} login password 'sesame'")
    engine = create_async_engine(primary.url.set(username=role, password="sesame"))
    try:
        for right in RIGHTS:
            await execute(primary, f"{right} to {role}")
        async with manager.session() as session, session.begin():
            session.add(Note(id="new", title="after"))
        async with engine.connect() as connection:
            for table in ("note", "outbox"):
                allowed = text("select has_table_privilege(:table, 'select')")
                assert (await connection.scalar(allowed, {"table": table})) == (table == "outbox")
        async with running(manager_of(engine, mirror, keep_events=0.001).relay()):
            await eventually(lambda: mirror.content_of("Note", "new"))
            await eventually(lambda: _pruned(primary))
    finally:
        await engine.dispose()
        await execute(primary, f"drop owned by {role}")
        await execute(primary, f"drop role {role}")


async def _pruned(primary: AsyncEngine) -> bool:
    return await value(primary, "select count(*) from outbox") == 0


async def test_what_one_process_did_is_in_the_next_one_s_counts_at_once(primary: AsyncEngine) -> None:
    """Seed D49, U11: every number comes from rows; no process keeps one of its own."""
    secondary = ScriptedSecondary("search")
    first, second = (manager_of(primary, secondary) for _ in range(2))
    await first.register()
    secondary.script("1", Retry("busy"))
    await write(first, change("1"), change("2"))
    await first.relay().run_once("search")
    one = msgspec.structs.replace(await first.backend_status("search"), lag=timedelta(0), silence=timedelta(0))
    two = msgspec.structs.replace(await second.backend_status("search"), lag=timedelta(0), silence=timedelta(0))
    assert one == two
    assert (two.applied, two.retried, two.pending) == (1, 1, 1)
