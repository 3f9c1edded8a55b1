"""Guarantee 11: whatever is written in the middle of a repair wins, nothing comes back, and nobody waits for a lock."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta

import msgspec
import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from outbox import SyncEvent
from outbox.listing import PrimaryRow
from outbox.migrate import migrate
from outbox.source import Source
from tests.comparing import Between, Interrupted, Note, World, said
from tests.relaying import own_server, rows, value
from tests.relaying import running as relaying
from tests.waiting import eventually

STEPS = ("before locked", "after locked", "before find", "after find")
WRITES = ("update", "delete", "delete and insert again", "change the key")


class Steps(Source):
    """A source that lets something happen before or after one of its steps, once."""

    step: str | None = None
    action: Between

    async def locked(
        self, session: AsyncSession, tenant_id: str, resource_type: str, resource_ids: Sequence[str]
    ) -> dict[str, SyncEvent | None]:
        await self._reach("before locked")
        found = await super().locked(session, tenant_id, resource_type, resource_ids)
        await self._reach("after locked")
        return found

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> dict[str, PrimaryRow]:
        await self._reach("before find")
        found = await super().find(tenant_id, resource_type, resource_ids)
        await self._reach("after find")
        return found

    async def _reach(self, step: str) -> None:
        if self.step == step:
            self.step = None
            await self.action()


class Repairs(World):
    """A world with `steps` for a source. The secondary lacks note 5, and has a note 9 that nobody else has."""

    steps: Steps

    async def open(self) -> Repairs:
        await super().open()
        self.source = self.steps = Steps(self.engine, self.manager.tracking)
        await self.write([str(number) for number in range(8)])
        await self.relay()
        del self.secondary.held["north", "Note", "5"]
        await self.invent("9")
        return self

    async def invent(self, name: str) -> None:
        event = SyncEvent.create("Note", name, said("nobody's"), tenant_id="north")
        self.secondary.held[event.key] = msgspec.structs.replace(event, position=1)

    async def change(self, kind: str, name: str) -> None:
        """Commit a change of one note, there or not."""
        async with self.manager.session() as session, session.begin():
            note = await session.get(Note, ("north", name))
            if note is None:
                session.add(Note(tenant_id="north", number=name, content=said(kind)))
            elif kind == "change the key":
                note.number = f"{name}-moved"
            elif kind == "update":
                note.content = said(kind)
            else:
                await session.delete(note)
                await session.flush()
                if kind == "delete and insert again":
                    session.add(Note(tenant_id="north", number=name, content=said(kind)))

    async def both(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return what each side holds, by id."""
        ours = {row["number"]: row["content"] for row in await rows(self.engine, "select number, content from note")}
        held = self.secondary.held.values()
        return ours, {event.resource_id: event.content for event in held if event.content is not None}


async def no_locks(primary: AsyncEngine) -> bool:
    return await value(primary, _LOCKS) == 0


@pytest.fixture
async def world(primary: AsyncEngine) -> AsyncIterator[Repairs]:
    yield await Repairs(primary, Interrupted("mirror")).open()
    # R8: none of these leaves a transaction open or a lock behind; a session that was just closed may take a moment.
    await eventually(lambda: no_locks(primary))


@pytest.mark.parametrize("step", STEPS)
async def test_a_write_at_any_step_of_a_restore_wins(world: Repairs, step: str) -> None:
    """R2, R3: what is deleted stays deleted, what is newer stays newer; a write that meets our lock comes after it."""
    for name, kind in enumerate(WRITES):
        await restore_while(world, step, kind, str(name))
    await world.relay()
    ours, theirs = await world.both()
    assert ours == {name: content for name, content in theirs.items() if name not in ("5", "9")} | {"5": said("first")}
    kept = dict(enumerate(kind in ("update", "delete and insert again") for kind in WRITES))
    assert {name: str(name) in theirs for name in kept} == kept


async def restore_while(world: Repairs, step: str, kind: str, name: str) -> None:
    """Let a change of a missing note come in at a step of its restoration."""
    del world.secondary.held["north", "Note", name]
    writing: list[asyncio.Task[None]] = []

    async def act() -> None:
        writing.append(asyncio.create_task(world.change(kind, name)))
        if step == "after locked":
            await eventually(lambda: _blocked(world.engine))
        else:
            await writing[0]

    # `find` is only asked about what was not there to lock, or is locked by others.
    world.steps.action, world.steps.step = act, step
    await world.repairer().restore("north", "Note", [name, "absent"])
    assert writing, "nothing happened in between"
    await asyncio.gather(*writing)


@pytest.mark.parametrize("step", ["before find", "after find"])
@pytest.mark.parametrize("ending", ["committed", "rolled back"])
async def test_an_insert_at_any_step_of_a_removal_wins(world: Repairs, step: str, ending: str) -> None:
    """R3: a delete never passes an insert, whether it began before the delete drew its position or after."""

    async def act() -> None:
        async with world.writing("9") as session:
            await (session.commit() if ending == "committed" else session.rollback())

    world.steps.action, world.steps.step = act, step
    removed = await world.repairer().remove("north", "Note", ["9"])
    assert world.steps.step is None, "nothing happened in between"
    assert removed == int((step, ending) != ("before find", "committed"))
    await world.relay()
    held = world.secondary.content_of("Note", "9", tenant_id="north")
    assert held == (said("late") if ending == "committed" else None)


async def test_an_insert_that_drew_its_position_first_is_waited_for_and_the_rest_still_removed(world: Repairs) -> None:
    """R3: one of two extras comes back; the removal leaves it alone and removes the other."""
    await world.invent("8")
    order: list[str] = []
    glances: list[str] = []
    event.listen(world.engine.sync_engine, "before_cursor_execute", lambda *sent: glances.append(sent[2]))

    async def look() -> None:
        order.append("looked")

    world.steps.action, world.steps.step = look, "before find"
    async with world.writing("9") as session:
        removing = asyncio.create_task(world.repairer().remove("north", "Note", ["8", "9"]))
        await eventually(lambda: order or sum("as writer" in sent for sent in glances) >= 3)
        order.append("committed")
        await session.commit()
    assert await removing == 1
    assert order == ["committed", "looked"]
    await world.relay()
    assert world.secondary.content_of("Note", "9", tenant_id="north") == said("late")
    assert world.secondary.content_of("Note", "8", tenant_id="north") is None


async def test_a_writer_that_does_not_end_costs_the_removal_and_nothing_else(world: Repairs) -> None:
    """R3: when patience is over nothing is recorded; the next run does it."""
    glances: list[str] = []
    event.listen(world.engine.sync_engine, "before_cursor_execute", lambda *sent: glances.append(sent[2]))
    extras = ["9", *(f"extra-{number}" for number in range(600))]
    async with world.writing("7"):
        assert await world.repairer(patience=1).remove("north", "Note", extras) == 0
    # One glance in fifty milliseconds, and two more for each of four pages: patience is for all of them.
    assert sum("as writer" in sent for sent in glances) <= 30
    assert await value(world.engine, "select count(*) from outbox where operation = 'delete'") == 0
    assert await world.repairer().remove("north", "Note", ["9"]) == 1


async def test_a_writer_that_prepares_its_commit_meanwhile_is_still_waited_for() -> None:
    """R3: a prepared transaction has a new name in the list of locks; its insert must not be passed either."""
    with own_server(max_prepared_transactions="4") as server:
        engine = create_async_engine(server.dsn())
        await migrate(engine)
        world = await Repairs(engine, Interrupted("mirror")).open()
        async with world.writing("9") as session:
            removing = asyncio.create_task(world.repairer(patience=2).remove("north", "Note", ["9"]))
            await eventually(lambda: _drawn(engine))
            await session.execute(text("prepare transaction 'late'"))
            await session.rollback()
        assert await removing == 0
        async with engine.connect() as connection:
            alone = await connection.execution_options(isolation_level="AUTOCOMMIT")
            await alone.execute(text("commit prepared 'late'"))
        await world.relay()
        assert world.secondary.content_of("Note", "9", tenant_id="north") == said("late")
        await engine.dispose()


@pytest.mark.parametrize("ending", ["changes nothing", "changes it"])
async def test_a_row_that_somebody_holds_is_neither_waited_for_nor_lost(world: Repairs, ending: str) -> None:
    """R1: it is passed by and tried again; whoever held it has recorded his own event, or changed nothing."""
    async with world.manager.session() as session:
        await session.begin()
        note = await session.get(Note, ("north", "5"), with_for_update=True)
        assert note is not None
        repairing = asyncio.create_task(world.repairer().restore("north", "Note", ["4", "5", "6"]))
        await eventually(lambda: _recorded(world.engine, {"4", "6"}))
        assert await _blocked(world.engine) is False
        if ending == "changes it":
            note.content = said("theirs")
        await session.commit()
    assert await repairing == 3
    await world.relay()
    expected = said("theirs" if ending == "changes it" else "first")
    assert world.secondary.content_of("Note", "5", tenant_id="north") == expected


async def test_a_row_that_is_held_for_good_is_left_to_the_next_run(world: Repairs) -> None:
    """R1: the repair ends without it, records the others, and says how many."""
    async with world.manager.session() as session, session.begin():
        await session.get(Note, ("north", "5"), with_for_update=True)
        assert await world.repairer().restore("north", "Note", ["4", "5"]) == 1
    assert (await world.reconcile(repair=True)).missing == 1
    await world.relay()
    assert world.secondary.content_of("Note", "5", tenant_id="north") == said("first")


@pytest.mark.parametrize("number", [2, 3])
async def test_several_repairs_at_once_are_safe_and_do_not_wait_for_each_other(world: Repairs, number: int) -> None:
    """R9: also where each removes the same extras; a wait for one another would last all of their patience."""
    for name in ("8", "90", "91"):
        await world.invent(name)
    runs = (world.reconcile(repair=True, patience=_ENDLESS) for _ in range(number))
    async with relaying(world.manager.relay()), asyncio.timeout(30):
        results = await asyncio.gather(*runs)
    assert all(result.refused == 0 for result in results)
    assert sum(result.repaired for result in results) >= 5
    await world.relay()
    ours, theirs = await world.both()
    assert ours == theirs
    assert (await world.reconcile()).in_sync


async def test_repair_records_who_and_why_and_owes_it_to_one_secondary_only(primary: AsyncEngine) -> None:
    """R1: an event of the row as it is, actor and reason in its headers, one delivery; nothing is written by hand."""
    world = await Repairs(primary, Interrupted("mirror")).open()
    other = World(primary, Interrupted("other"))
    await other.manager.register()
    before = dict(world.secondary.held)
    found = await world.reconcile(repair=True, actor="ada", reason="a disk was lost")
    assert (found.missing, found.extra, found.repaired) == (1, 1, 2)
    assert world.secondary.held == before
    newest = await rows(primary, "select * from outbox order by event_id desc limit 2")
    said_of = {row["resource_id"]: (row["operation"], row["content"], row["headers"]) for row in newest}
    headers = {"actor": "ada", "repair": "a disk was lost"}
    assert said_of == {"5": ("update", json.loads(said("first")), headers), "9": ("delete", None, headers)}
    owed = await rows(primary, "select backend_id, event_id from outbox_delivery")
    assert {(row["backend_id"], row["event_id"]) for row in owed} == {("mirror", row["event_id"]) for row in newest}
    (note,) = await rows(primary, "select * from outbox_reconciliation")
    kept = ("actor", "reason", "repair", "missing", "extra", "repaired", "primary_count", "secondary_count")
    assert tuple(note[name] for name in kept) == ("ada", "a disk was lost", True, 1, 1, 2, 8, 8)
    assert note["high_water"] < min(row["event_id"] for row in newest)


_ENDLESS = timedelta(minutes=10)
_HERE = "database = (select oid from pg_database where datname = current_database())"


_LOCKS = f"""
select count(*) from pg_locks
where {_HERE} and pid <> pg_backend_pid() and locktype in ('advisory', 'relation', 'transactionid')
"""
_DRAWN = f"""
select count(*) from pg_locks
where {_HERE} and mode = 'RowExclusiveLock' and relation = to_regclass('outbox')
"""


async def _blocked(engine: AsyncEngine) -> bool:
    blocked = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    return bool(await value(engine, blocked))


async def _drawn(engine: AsyncEngine) -> bool:
    """Whether somebody else than the one insert has drawn a position."""
    return bool(await value(engine, _DRAWN) == 2)


async def _recorded(engine: AsyncEngine, names: set[str]) -> bool:
    found = await rows(engine, "select resource_id from outbox where headers is not null")
    return names <= {row["resource_id"] for row in found}
