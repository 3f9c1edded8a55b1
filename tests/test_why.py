"""Why: the story of one resource says what each side holds, what is owed, and what is waited for, in one sentence."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import msgspec
import psycopg
import pytest
from relaying import claim_by_hand, dsn_of, execute, manager_of, removal, value
from scripted import ScriptedSecondary
from sqlalchemy import BigInteger, Uuid, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox import MemorySecondary, Registration, Rejected, ResourceDigest, SyncEvent, SyncManager, Unavailable, Which
from outbox.render import json_text
from outbox.story import Standing, Story

HOUR = timedelta(hours=1)
CANARY = "canary-7f3a"


class Base(DeclarativeBase): ...


class Thing(Base):
    __tablename__ = "thing"
    id: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int]


class Numbered(Base):
    __tablename__ = "numbered"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)


class Named(Base):
    __tablename__ = "named"
    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True)


@pytest.fixture
async def engine(primary: AsyncEngine) -> AsyncEngine:
    async with primary.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    return primary


def tracking(engine: AsyncEngine, *secondaries: Any, **settings: Any) -> SyncManager:
    manager = manager_of(engine, *secondaries, **settings)
    manager.track(Thing, resource_id=Thing.id, content=lambda thing: {"value": thing.value})
    return manager


async def started(engine: AsyncEngine, *secondaries: Any, **settings: Any) -> SyncManager:
    """A manager whose secondaries are registered, and whose relay has just asked what is due."""
    manager = tracking(engine, *secondaries, **settings)
    await manager.register()
    await manager.relay().drain()
    return manager


async def put(manager: SyncManager, number: int, name: str = "1") -> None:
    async with manager.session() as session, session.begin():
        await session.merge(Thing(id=name, value=number))


async def sentence(manager: SyncManager, backend_id: str = "scripted") -> str:
    return standing(await manager.why("Thing", "1"), backend_id).waits_for


def standing(story: Story, backend_id: str = "scripted") -> Standing:
    return next(each for each in story.secondaries if each.backend_id == backend_id)


async def test_what_is_in_step_waits_for_nothing(engine: AsyncEngine) -> None:
    manager = await started(engine, ScriptedSecondary())
    await put(manager, 1)
    await manager.relay().drain()
    story = await manager.why("Thing", "1")
    assert story.in_step
    assert story.primary.present
    assert standing(story).copy.equal is True
    assert standing(story).copy.digest == story.primary.digest
    assert standing(story).waits_for == "nothing: it is in step"


async def test_what_is_on_neither_side_is_in_step_too(engine: AsyncEngine) -> None:
    manager = await started(engine, ScriptedSecondary())
    story = await manager.why("Thing", "nobody")
    assert story.in_step
    assert not story.events


async def test_the_story_names_events_with_their_headers_and_attempts_but_never_content(engine: AsyncEngine) -> None:
    """Guarantee 14: neither content nor a header that is not ours."""
    manager = await started(engine, ScriptedSecondary())
    headers = {"correlation-id": "c-1", "actor": "Zoë", "other": CANARY}
    async with manager.session(headers=headers) as session, session.begin():
        session.record(SyncEvent.update("Thing", "1", {"secret": CANARY}, version="7"))
    await manager.relay().drain()
    story = await manager.why("Thing", "1")
    [kept] = story.events
    assert (kept.operation, kept.version, kept.correlation_id, kept.actor) == ("update", "7", "c-1", "Zoë")
    [attempt] = standing(story).attempts
    assert (attempt.positions, attempt.events, attempt.applied) == ((kept.position,), 1, 1)
    assert attempt.finished_at is not None
    text = json_text(msgspec.structs.asdict(story))
    assert CANARY not in text
    assert json.loads(text)["events_kept"] == 1


async def test_an_attempt_shows_of_a_batch_only_the_positions_of_the_key(engine: AsyncEngine) -> None:
    manager = await started(engine, ScriptedSecondary())
    for name in ("0", "1", "2"):
        await put(manager, 1, name)
    await manager.relay().drain()
    story = await manager.why("Thing", "1")
    [attempt] = standing(story).attempts
    assert (attempt.positions, attempt.events) == ((story.events[0].position,), 3)


async def test_who_is_not_in_the_registry_is_owed_nothing(engine: AsyncEngine) -> None:
    manager = tracking(engine, ScriptedSecondary())
    assert await sentence(manager) == ("nothing: the registry does not have it; a relay or register() puts it there")


async def test_a_removed_one_waits_for_nothing(engine: AsyncEngine) -> None:
    manager = await started(engine, ScriptedSecondary())
    await put(manager, 1)
    await execute(engine, "update outbox_secondary set status = 'removed'")
    assert await sentence(manager) == "nothing that will come: the secondary was removed before it had this"
    await execute(engine, "delete from outbox_delivery")
    assert await sentence(manager) == "nothing: it is removed, and nothing more is carried to it"


async def test_one_that_does_not_want_the_type_is_in_step(engine: AsyncEngine) -> None:
    manager = await started(engine, Registration(ScriptedSecondary(), resource_types=["Other"]))
    await put(manager, 1)
    assert await sentence(manager) == "nothing: it does not take this tenant or type"
    assert (await manager.why("Thing", "1")).in_step


async def test_a_fresh_delivery_waits_for_a_claim_and_for_what_lies_before_it(engine: AsyncEngine) -> None:
    manager = await started(engine, ScriptedSecondary())
    await put(manager, 1)
    assert await sentence(manager) == "a relay's next claim: it is due"
    await execute(engine, "delete from outbox_delivery")
    await put(manager, 1, "2")
    await put(manager, 1, "3")
    await put(manager, 2)
    assert await sentence(manager) == "its turn: 2 deliveries lie before it in its lane"
    assert not (await manager.why("Thing", "1")).in_step


async def test_a_relay_that_never_looked_or_is_silent_is_waited_for(engine: AsyncEngine) -> None:
    manager = tracking(engine, ScriptedSecondary())
    await manager.register()
    await put(manager, 1)
    assert await sentence(manager) == "a relay: none has ever asked what is due for this secondary"
    await execute(engine, "update outbox_secondary set looked_at = timestamptz '2020-02-03 04:05:06Z'")
    assert await sentence(manager) == "a relay: none has asked what is due since 2020-02-03 04:05:06 UTC"


async def test_a_paused_one_waits_for_its_operator(engine: AsyncEngine) -> None:
    manager = await started(engine, ScriptedSecondary())
    await put(manager, 1)
    await manager.pause("scripted")
    assert await sentence(manager) == ("an operator: scripted is paused; outbox resume scripted goes on with it")


async def test_one_ahead_of_the_primary_waits_for_somebody(engine: AsyncEngine) -> None:
    """C4."""
    manager = await started(engine, ScriptedSecondary())
    await put(manager, 1)
    await execute(engine, "update outbox_secondary set beyond = 900")
    assert "holds position 900, which the primary has not given" in await sentence(manager)


async def test_what_is_in_hand_waits_for_its_attempt_and_says_until_when(engine: AsyncEngine) -> None:
    manager = await started(engine, ScriptedSecondary())
    await put(manager, 1)
    await claim_by_hand(engine, "scripted", lease=HOUR, relay_id=UUID(int=0xABCD << 112))
    told = standing(await manager.why("Thing", "1"))
    assert told.waits_for.startswith("attempt 1 of relay abcd0000 has it in hand since ")
    assert told.moves_at == told.in_hand[0].lease_until
    assert told.in_hand[0].positions == (1,)


async def test_what_came_later_waits_behind_the_key_s_attempt(engine: AsyncEngine) -> None:
    manager = await started(engine, ScriptedSecondary())
    await put(manager, 1)
    await claim_by_hand(engine, "scripted", lease=HOUR)
    await put(manager, 2)
    assert (await sentence(manager)).startswith("event 2 waits behind the key's earlier event in attempt 1 of relay ")
    await put(manager, 3)
    assert (await sentence(manager)).startswith("event 2 and 1 more wait behind the key's earlier event in attempt 1")


async def test_what_a_lost_attempt_had_waits_for_the_next_claim(engine: AsyncEngine) -> None:
    manager = await started(engine, ScriptedSecondary())
    await put(manager, 1)
    await claim_by_hand(engine, "scripted")
    told = await sentence(manager)
    assert told.startswith("a relay's next claim: the lease of attempt 1 ended at ")


async def test_what_failed_waits_for_its_next_attempt_and_tells_the_error(engine: AsyncEngine) -> None:
    secondary = ScriptedSecondary()
    manager = await failing(engine, secondary)
    await execute(engine, "update outbox_hold set state = 'retrying', next_attempt_at = '2100-01-02 03:04:05Z'")
    told = standing(await manager.why("Thing", "1"))
    assert told.waits_for == "its next attempt, number 2, at 2100-01-02 03:04:05 UTC"
    assert told.moves_at is not None
    assert told.held is not None
    assert (told.held.error_code, told.held.error, told.held.attempts) == ("refused", "never this one", 1)
    assert told.held.first_failed_at is not None
    assert told.held.positions == (1,)


async def failing(engine: AsyncEngine, secondary: ScriptedSecondary, ordering: Any = "state") -> SyncManager:
    """A manager one of whose keys is dead."""
    manager = await started(engine, Registration(secondary, ordering=ordering))
    secondary.script("1", Rejected("refused", "never this one"))
    await put(manager, 1)
    await manager.relay().drain()
    return manager


async def test_what_is_dead_waits_for_somebody_until_it_is_written_again(engine: AsyncEngine) -> None:
    manager = await failing(engine, ScriptedSecondary())
    assert await sentence(manager) == (
        "somebody: it is dead after 1 attempt (refused); outbox failures redrive, or write the resource again"
    )
    await put(manager, 2)
    assert await sentence(manager) == "a relay's next claim: it is due"


async def test_in_log_order_what_came_after_a_dead_one_waits_with_it(engine: AsyncEngine) -> None:
    manager = await failing(engine, ScriptedSecondary(), "log")
    await put(manager, 2)
    assert (await sentence(manager)).startswith("somebody: it is dead after 1 attempt (refused)")


async def test_the_breaker_is_waited_for_until_it_lets_a_probe_through(engine: AsyncEngine) -> None:
    manager = await started(engine, ScriptedSecondary())
    await put(manager, 1)
    await execute(engine, "update outbox_secondary set breaker = 'open', breaker_until = '2100-01-02 03:04:05Z'")
    told = standing(await manager.why("Thing", "1"))
    assert told.waits_for == ("the secondary, which does not answer: its breaker is open until 2100-01-02 03:04:05 UTC")
    assert told.moves_at == told.breaker_until
    await execute(engine, "update outbox_secondary set breaker = 'half_open'")
    assert await sentence(manager) == ("the secondary, which did not answer: one probe is under way, and decides")


async def test_what_was_given_up_says_why_until_it_is_written_again(engine: AsyncEngine) -> None:
    manager = await failing(engine, ScriptedSecondary())
    await manager.discard(Which(state="dead"), reason="not ours")
    told = standing(await manager.why("Thing", "1"))
    assert told.waits_for == "nothing: event 1 was given up (not ours); write the resource again"
    assert (told.given_up[0].position, told.given_up[0].reason) == (1, "not ours")
    await put(manager, 2)
    await manager.relay().drain()
    assert await sentence(manager) == "nothing: it is in step"


async def test_what_differs_though_nothing_is_owed_is_for_reconcile(engine: AsyncEngine) -> None:
    secondary = ScriptedSecondary()
    manager = await started(engine, secondary)
    await put(manager, 1)
    await manager.relay().drain()
    secondary.held.clear()
    assert await sentence(manager) == ("nothing, though it differs: outbox reconcile scripted --repair restores it")


class Silent(ScriptedSecondary):
    """Does not answer when it is asked."""

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> Sequence[ResourceDigest]:
        raise Unavailable("refused", "on purpose")


class Blind:
    """Cannot look at single resources."""

    backend_id = "blind"

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Any]:
        raise AssertionError("nobody carries to it here")

    def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> AsyncIterator[ResourceDigest]:
        raise AssertionError("nobody lists it here")


async def test_what_cannot_be_seen_is_said(engine: AsyncEngine) -> None:
    manager = await started(engine, Silent())
    other = tracking(engine, Blind())
    await other.register()
    await execute(engine, "insert into outbox_secondary (backend_id) values ('stranger')")
    told = await manager.why("Thing", "1")
    assert standing(told).waits_for == (
        "nothing that is owed; what it holds cannot be said: it does not answer (refused)"
    )
    assert standing(told, "stranger").waits_for.endswith("this process does not have its adapter")
    assert (await sentence(other, "blind")).endswith("its adapter does not look at single resources")
    assert standing(told).copy.equal is None
    assert not told.in_step


async def test_a_type_that_is_not_tracked_is_said_to_be_so(engine: AsyncEngine) -> None:
    manager = manager_of(engine, ScriptedSecondary())
    await manager.register()
    told = await manager.why("Thing", "1")
    assert not told.primary.tracked
    assert standing(told).waits_for == (
        "nothing that is owed; what the primary holds cannot be said: Thing is not tracked here"
    )
    assert not told.in_step


class Moving(ScriptedSecondary):
    """Gets a newer state in the moment between the primary's side and its own."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = False
        self.manager: SyncManager | None = None

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> Sequence[ResourceDigest]:
        if self.manager is not None and not self.moved:
            self.moved = True
            await put(self.manager, 2)
            await self.manager.relay().drain()
        return await super().find(tenant_id, resource_type, resource_ids)


async def test_a_write_between_the_two_sides_never_looks_like_a_difference(engine: AsyncEngine) -> None:
    """R4."""
    secondary = Moving()
    manager = await started(engine, secondary)
    await put(manager, 1)
    await manager.relay().drain()
    secondary.manager = manager
    told = await manager.why("Thing", "1")
    assert secondary.moved
    assert told.in_step
    assert len(told.events) == 2


class Watching(MemorySecondary):
    """Knows who holds a connection while it is asked."""

    def __init__(self, engine: AsyncEngine) -> None:
        super().__init__("scripted")
        self.engine = engine
        self.open: int | None = None

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> Sequence[ResourceDigest]:
        self.open = self.engine.sync_engine.pool.checkedout()  # type: ignore[attr-defined]
        return await super().find(tenant_id, resource_type, resource_ids)


async def test_no_connection_is_held_while_a_secondary_is_asked(engine: AsyncEngine) -> None:
    """Guarantee 6."""
    secondary = Watching(engine)
    manager = await started(engine, secondary)
    await manager.why("Thing", "1")
    assert secondary.open == 0


async def test_the_primary_s_side_is_one_snapshot(engine: AsyncEngine) -> None:
    """What is carried while the story is gathered is either pending or done, never neither."""
    manager = await started(engine, ScriptedSecondary())
    await put(manager, 1)
    plain = dsn_of(engine).replace("+asyncpg", "")

    def carry(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "count(*) over () as kept" in statement:
            with psycopg.connect(plain) as other:
                other.execute("delete from outbox_delivery")

    event.listen(engine.sync_engine, "before_cursor_execute", carry)
    told = standing(await manager.why("Thing", "1"))
    assert await value(engine, "select count(*) from outbox_delivery") == 0
    assert told.pending == (1,)


async def test_the_story_changes_nothing_and_leaves_the_pool_as_it_was(engine: AsyncEngine) -> None:
    manager = await started(engine, ScriptedSecondary())
    await manager.why("Thing", "1")
    assert await value(engine, "select current_setting('transaction_isolation')") == "read committed"
    assert await value(engine, "select current_setting('transaction_read_only')") == "off"


@pytest.mark.parametrize("entity", [Numbered, Named])
async def test_ids_of_other_types_are_found_and_what_is_no_such_id_is_absent(
    engine: AsyncEngine, entity: type[Numbered | Named]
) -> None:
    manager = manager_of(engine, ScriptedSecondary())
    manager.track(entity)
    await manager.register()
    name = uuid4() if entity is Named else 7
    async with manager.session() as session, session.begin():
        session.add(entity(id=name))
    assert (await manager.why(entity.__name__, str(name))).primary.present
    for odd in ("x", "", "07", str(2**70), str(name).upper() + " "):
        assert not (await manager.why(entity.__name__, odd)).primary.present


async def test_tenants_and_types_are_kept_apart(engine: AsyncEngine) -> None:
    """Security 3: a key that differs in its tenant or type alone is another story."""
    manager = await started(engine, ScriptedSecondary())
    async with manager.session() as session, session.begin():
        session.record(removal("1", tenant="north"), SyncEvent.delete("Other", "1"))
    told = await manager.why("Thing", "1")
    assert not told.events
    assert not standing(told).owed
    assert (await manager.why("Thing", "1", "north")).events
