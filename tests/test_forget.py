"""Forget: a resource is deleted at every secondary, scrubbed from what is kept, and what is not proved is named."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
from relaying import everything, execute, hold_of, manager_of, rows, running, value
from scripted import ScriptedSecondary
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from waiting import eventually

from outbox import (
    Evidence,
    NotForgotten,
    Registration,
    Rejected,
    ResourceDigest,
    Retry,
    SyncEvent,
    SyncManager,
    Unavailable,
    Which,
)
from outbox.answer import SyncState

CANARY = "canary-5b1e"
SHORT = timedelta(seconds=0.3)
MADE: list[SyncManager] = []


class Base(DeclarativeBase): ...


class Patient(Base):
    __tablename__ = "patient"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]


@pytest.fixture
async def engine(primary: AsyncEngine) -> AsyncEngine:
    async with primary.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    return primary


@pytest.fixture(autouse=True)
async def made(primary: AsyncEngine) -> AsyncIterator[None]:
    """Close every manager that a test made: a caller who waits opens a relay of its own."""
    MADE.clear()
    yield
    for manager in MADE:
        await manager.aclose()


async def started(engine: AsyncEngine, *secondaries: Any, tracked: bool = True) -> SyncManager:
    manager = manager_of(engine, *secondaries)
    MADE.append(manager)
    if tracked:
        manager.track(Patient)
    await manager.register()
    return manager


async def admit(manager: SyncManager, name: str = CANARY) -> str:
    """Write the patient; return the token."""
    async with manager.session(headers={"ward": CANARY}) as session, session.begin():
        await session.merge(Patient(id="7", name=name))
    assert session.token is not None
    return session.token


async def discharge(manager: SyncManager) -> None:
    async with manager.session(actor=CANARY) as session, session.begin():
        patient = await session.get(Patient, "7")
        assert patient is not None
        await session.delete(patient)


async def forget(manager: SyncManager, **options: Any) -> Evidence:
    return await manager.forget("Patient", "7", **options)


async def kept(engine: AsyncEngine) -> str:
    """Everything that the outbox's tables hold, as one text."""
    return json.dumps(await everything(engine))


async def test_nothing_of_a_forgotten_resource_is_left_but_positions(engine: AsyncEngine) -> None:
    """Security 7: no content, header, error or note; what was done stays told, and tokens stay true (W1, W5)."""
    secondary = ScriptedSecondary()
    manager = await started(engine, secondary)
    token = await admit(manager)
    await manager.relay().drain()
    await discharge(manager)
    assert CANARY in await kept(engine)
    evidence = await forget(manager, reason="request 12")
    assert evidence.complete, evidence.unproved
    assert evidence.scrubbed.events == 2
    assert CANARY not in await kept(engine)
    events = await rows(engine, "select operation, cast(content as text) as content from outbox order by event_id")
    assert [tuple(event.values()) for event in events] == [("create", "{}"), ("delete", None), ("delete", None)]
    assert await manager.wait_for_sync(token, timeout=0)
    [erased] = evidence.secondaries
    assert erased.absent is True
    assert erased.delete is SyncState.APPLIED
    assert erased.verified_at is not None
    assert secondary.content_of("Patient", "7") is None
    assert (await manager.why("Patient", "7")).in_step


async def test_the_reason_travels_with_the_delete_and_the_next_call_takes_it_out(engine: AsyncEngine) -> None:
    secondary = ScriptedSecondary()
    manager = await started(engine, secondary)
    await forget(manager, reason="request 12")
    assert secondary.history[-1].headers == '{"reason":"request 12"}'
    evidence = await forget(manager)
    assert evidence.complete
    assert "request 12" not in await kept(engine)


async def test_a_second_call_is_harmless(engine: AsyncEngine) -> None:
    manager = await started(engine, ScriptedSecondary())
    await admit(manager)
    await discharge(manager)
    first, second = await forget(manager), await forget(manager)
    assert first.complete
    assert second.complete
    assert second.scrubbed.events == 0


async def test_two_calls_at_once_do_not_wait_for_each_other_for_ever(engine: AsyncEngine) -> None:
    """R9."""
    manager = await started(engine, ScriptedSecondary())
    await admit(manager)
    await discharge(manager)
    async with running(manager.relay()):
        evidences = await asyncio.gather(*(forget(manager) for _ in range(4)))
    assert all(evidence.complete for evidence in evidences)
    assert sum(evidence.scrubbed.events for evidence in evidences) == 2


async def test_it_is_refused_while_the_primary_has_the_resource(engine: AsyncEngine) -> None:
    manager = await started(engine, ScriptedSecondary())
    await admit(manager)
    before = await everything(engine)
    with pytest.raises(NotForgotten, match="the primary still has it"):
        await forget(manager)
    with pytest.raises(NotForgotten, match="the primary still has it"):
        await forget(manager, dry_run=True)
    assert await everything(engine) == before


async def test_where_no_class_is_tracked_the_newest_event_tells_and_the_doubt_is_named(engine: AsyncEngine) -> None:
    manager = await started(engine, ScriptedSecondary(), tracked=False)
    await manager.sync(SyncEvent.update("Patient", "7", {"name": CANARY}))
    with pytest.raises(NotForgotten, match="its newest event is no delete"):
        await forget(manager)
    await manager.sync(SyncEvent.delete("Patient", "7"))
    evidence = await forget(manager)
    assert not evidence.complete
    assert evidence.unproved == ("the primary: Patient is not tracked here, so nobody can say that it is gone",)
    assert CANARY not in await kept(engine)


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_an_open_write_may_bring_it_back_so_nothing_is_erased(engine: AsyncEngine, level: Any) -> None:
    """R2: its position is lower than the delete's, and every secondary would refuse it.

    At whatever level the application works: the look after the wait must not be on the snapshot from before it.
    """
    manager = await started(engine.execution_options(isolation_level=level), ScriptedSecondary())
    async with manager.session() as session, session.begin():
        session.add(Patient(id="7", name="new"))
        await session.flush()
        with pytest.raises(NotForgotten, match="still open"):
            await forget(manager, timeout=SHORT)
        forgetting = asyncio.create_task(forget(manager))
        await eventually(lambda: waits_for_writers(engine))
    with pytest.raises(NotForgotten, match="the primary still has it"):
        await forgetting
    assert await value(engine, "select count(*) from outbox") == 1
    await manager.relay().drain()
    assert (await manager.why("Patient", "7")).in_step


async def waits_for_writers(engine: AsyncEngine) -> bool:
    """Whether somebody looks at who else writes."""
    sql = "select count(*) from pg_stat_activity where query like '%virtualtransaction%' and pid <> pg_backend_pid()"
    return bool(await value(engine, sql))


async def test_a_dry_run_changes_nothing_and_says_where_it_is(engine: AsyncEngine) -> None:
    manager = await started(engine, ScriptedSecondary())
    await admit(manager)
    await manager.relay().drain()
    await discharge(manager)
    before = await everything(engine)
    evidence = await forget(manager, dry_run=True)
    assert await everything(engine) == before
    assert (evidence.position, evidence.scrubbed.events, evidence.complete) == (None, 2, False)
    assert evidence.secondaries[0].absent is False


async def test_a_paused_one_is_not_proved_and_never_gets_the_content_afterwards(engine: AsyncEngine) -> None:
    paused, shadow = ScriptedSecondary("paused"), ScriptedSecondary("shadow")
    manager = await started(engine, paused, shadow)
    await manager.pause("paused")
    await execute(engine, "update outbox_secondary set status = 'shadow' where backend_id = 'shadow'")
    await admit(manager)
    await discharge(manager)
    evidence = await forget(manager)
    assert evidence.unproved == ("paused: the delete has not arrived (paused)",)
    assert [each.absent for each in evidence.secondaries] == [True, True]
    await manager.resume("paused")
    await manager.relay().drain()
    assert [event.content for event in paused.history] == [None]
    assert (await forget(manager)).complete


@pytest.mark.parametrize("status", ["draining", "removed"])
async def test_one_that_gets_no_new_events_is_named_as_not_reached(engine: AsyncEngine, status: str) -> None:
    manager = await started(engine, ScriptedSecondary())
    await execute(engine, "update outbox_secondary set status = :status", status=status)
    evidence = await forget(manager)
    assert evidence.unproved == (f"scripted: it is {status}, so no delete reaches it",)


async def test_one_that_no_longer_wants_the_resource_is_owed_its_delete_too(engine: AsyncEngine) -> None:
    secondary = ScriptedSecondary()
    manager = await started(engine, secondary)
    await admit(manager)
    await manager.relay().drain()
    manager = await started(engine, Registration(secondary, resource_types=["Other"]))
    await discharge(manager)
    assert secondary.content_of("Patient", "7") is not None
    evidence = await forget(manager)
    assert evidence.complete
    assert secondary.content_of("Patient", "7") is None


@pytest.mark.parametrize("ordering", ["state", "log"])
async def test_what_is_dead_or_behind_it_is_never_sent_with_its_content(engine: AsyncEngine, ordering: Any) -> None:
    """Security 7: in log order every event is still sent, each as a delete."""
    secondary = ScriptedSecondary()
    manager = await started(engine, Registration(secondary, ordering=ordering))
    secondary.script("7", Rejected("refused", f"field {CANARY} is bad"))
    await admit(manager)
    await manager.relay().drain()
    await admit(manager, CANARY + "2")
    await discharge(manager)
    sent = len(secondary.sent)
    assert (await hold_of(engine, "7") or {})["state"] == "dead"
    async with running(manager.relay()):
        evidence = await forget(manager)
    assert evidence.complete, evidence.unproved
    assert evidence.scrubbed.failures == 1
    assert all(event.content is None for call in secondary.calls[1:] for event in call.events)
    assert len(secondary.sent) - sent == (4 if ordering == "log" else 1)
    assert CANARY not in await kept(engine)
    assert await hold_of(engine, "7") is None


async def test_an_error_that_comes_after_the_scrub_is_scrubbed_too(engine: AsyncEngine) -> None:
    """Security 6, 7: what was in hand with its content fails while the delete is waited for."""
    secondary = ScriptedSecondary()
    manager = await started(engine, Registration(secondary, ordering="log"))
    secondary.script("7", Rejected("refused", f"field {CANARY} is bad"))
    secondary.hang()
    await admit(manager)
    async with running(manager.relay()):
        await eventually(lambda: secondary.running)
        await discharge(manager)
        forgetting = asyncio.create_task(forget(manager))
        await eventually(lambda: scrubbed(engine))
        secondary.release()
        evidence = await forgetting
    assert evidence.complete, evidence.unproved
    assert CANARY not in await kept(engine)
    assert secondary.content_of("Patient", "7") is None


async def scrubbed(engine: AsyncEngine) -> bool:
    return CANARY not in await kept(engine)


async def test_a_note_of_what_was_given_up_loses_its_reason(engine: AsyncEngine) -> None:
    secondary = ScriptedSecondary()
    manager = await started(engine, secondary)
    secondary.script("7", Rejected("refused"))
    token = await admit(manager)
    await manager.relay().drain()
    await manager.discard(Which(), reason=f"{CANARY} asked us to")
    await discharge(manager)
    evidence = await forget(manager)
    assert evidence.complete
    assert evidence.scrubbed.notes == 1
    assert CANARY not in await kept(engine)
    [status] = await manager.wait_for_sync(token, timeout=0)
    assert status.state is SyncState.DISCARDED


async def test_what_keeps_failing_or_is_away_is_not_proved(engine: AsyncEngine) -> None:
    away, stubborn = ScriptedSecondary("away"), ScriptedSecondary("stubborn")
    away.down = Unavailable("refused", "on purpose")
    stubborn.always("7", Retry("busy", CANARY))
    manager = await started(engine, away, stubborn)
    async with running(manager.relay()):
        evidence = await forget(manager, timeout=SHORT)
        assert [sentence.partition(" (")[0] for sentence in evidence.unproved] == [
            "away: the delete has not arrived",
            "stubborn: the delete has not arrived",
        ]
        away.down = None
        stubborn.heal("7")
        assert (await forget(manager)).complete


class Blind:
    """Cannot look at single resources."""

    backend_id = "blind"

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Any]:
        return await ScriptedSecondary().apply(batch)

    def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> Any:
        raise AssertionError("nobody lists it here")


class Broken(ScriptedSecondary):
    """Its looks end in whatever they are told to, in one of two places."""

    def __init__(self, error: BaseException | None, *, when_refreshed: bool = False) -> None:
        super().__init__("broken")
        self.error, self.when_refreshed = error, when_refreshed

    async def refresh(self) -> None:
        if self.error and self.when_refreshed:
            raise self.error

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> Sequence[ResourceDigest]:
        if self.error:
            raise self.error
        return None  # type: ignore[return-value]


@pytest.mark.parametrize(
    "broken",
    [
        Broken(RuntimeError(CANARY)),
        Broken(RuntimeError(CANARY), when_refreshed=True),
        Broken(asyncio.CancelledError(CANARY)),
        Broken(None),
    ],
)
async def test_whatever_a_look_ends_in_the_evidence_is_told_and_names_it(engine: AsyncEngine, broken: Broken) -> None:
    """R5, Security 6: by then it is committed; the error's own words, which may quote content, are kept back."""
    manager = await started(engine, broken)
    evidence = await forget(manager)
    doubt = "what it holds cannot be said: it does not answer (adapter_error)"
    assert evidence.unproved == (f"broken: {doubt}",)
    story = await manager.why("Patient", "7")
    assert [each.copy and each.copy.unknown for each in story.secondaries] == [doubt]


async def test_a_look_that_hangs_can_be_cancelled(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """B8."""
    hanging = asyncio.Event()

    async def hang(*_: Any) -> None:
        hanging.set()
        await asyncio.Event().wait()

    manager = await started(engine, ScriptedSecondary())
    monkeypatch.setattr(ScriptedSecondary, "find", hang)
    looking = asyncio.create_task(manager.why("Patient", "7"))
    await hanging.wait()
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking


class Liar(ScriptedSecondary):
    """Says that it has the resource, at this position."""

    position = 1

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> Sequence[ResourceDigest]:
        return [ResourceDigest(resource_ids[0], self.position, "")]


async def test_absence_is_looked_at_and_never_taken_for_granted(engine: AsyncEngine) -> None:
    """R5: an applied delete is no proof."""
    liar = Liar()
    manager = await started(engine, Blind(), liar)
    evidence = await forget(manager)
    assert evidence.unproved == (
        "blind: what it holds cannot be said: its adapter does not look at single resources",
        "scripted: it still holds it",
    )
    liar.position = 900
    assert (await forget(manager)).unproved[1] == "scripted: it was written again, at position 900"


async def test_another_tenant_s_resource_of_the_same_name_is_left_alone(engine: AsyncEngine) -> None:
    """Security 3."""
    secondary = ScriptedSecondary()
    manager = await started(engine, secondary)
    await manager.sync(SyncEvent.create("Patient", "7", {"name": CANARY}, tenant_id="north"), backends=["scripted"])
    await forget(manager)
    assert secondary.content_of("Patient", "7", tenant_id="north") is not None
    assert CANARY in await kept(engine)
