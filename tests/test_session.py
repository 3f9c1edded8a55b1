"""The sessions: what they refuse, what they do instead, and in which order and number of statements they record."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Column, Engine, ForeignKey, Integer, Text, create_engine, delete, insert, select, text, update
from sqlalchemy import event as engine_event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, aliased, declarative_base
from sqlalchemy.pool import NullPool

from outbox import MemorySecondary, SyncConfig, SyncEvent, SyncManager, UntrackedWrite


def classes() -> tuple[type[Any], type[Any], type[Any]]:
    """Return a tracked class, a subclass with a table of its own, and a class that nobody tracks."""
    base = declarative_base()

    class Note(base):
        __tablename__ = "note"
        id = Column(Text, primary_key=True)
        kind = Column(Text, nullable=False, default="note")
        title = Column(Text)
        __mapper_args__ = {"polymorphic_on": kind, "polymorphic_identity": "note"}  # noqa: RUF012 - as SQLAlchemy has it

    class Memo(Note):
        __tablename__ = "memo"
        id = Column(ForeignKey("note.id"), primary_key=True)
        pages = Column(Integer)
        __mapper_args__ = {"polymorphic_identity": "memo"}  # noqa: RUF012 - as SQLAlchemy has it

    class Other(base):
        __tablename__ = "other"
        id = Column(Text, primary_key=True)
        title = Column(Text)

    return Note, Memo, Other


@dataclass
class House:
    """A manager, its classes, and a synchronous engine on the same primary."""

    manager: SyncManager
    engine: Engine
    note: type[Any]
    memo: type[Any]
    other: type[Any]

    async def rows(self, query: str) -> list[tuple[Any, ...]]:
        async with self.manager.engine.connect() as connection:
            return [tuple(row) for row in await connection.execute(text(query))]

    async def events(self) -> list[tuple[str, str]]:
        """Return operation and resource id of every event, in order."""
        return [
            (row[0], row[1]) for row in await self.rows("select operation, resource_id from outbox order by event_id")
        ]


@pytest.fixture
async def house(primary: AsyncEngine) -> House:
    note, memo, other = classes()
    manager = SyncManager(primary, [MemorySecondary()], config=SyncConfig(doorbell=False))
    manager.track(note)
    await manager.register()
    async with primary.begin() as connection:
        await connection.run_sync(note.metadata.create_all)
    engine = create_engine(primary.url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
    return House(manager, engine, note, memo, other)


BULK: dict[str, Callable[[Session, House], Any]] = {
    "update of the class": lambda session, house: session.execute(update(house.note).values(title="x")),
    "update of an alias": lambda session, house: session.execute(update(aliased(house.note)).values(title="x")),
    "update of the table": lambda session, house: session.execute(update(house.note.__table__).values(title="x")),
    "update of a subclass": lambda session, house: session.execute(update(house.memo).values(pages=1)),
    "update of a subclass's table": lambda session, house: session.execute(
        update(house.memo.__table__).values(pages=1)
    ),
    "updates by primary key": lambda session, house: session.execute(update(house.note), [{"id": "1", "title": "x"}]),
    "delete of the class": lambda session, house: session.execute(delete(house.note)),
    "delete of the table": lambda session, house: session.execute(delete(house.note.__table__)),
    "insert of the class": lambda session, house: session.execute(insert(house.note).values(id="2")),
    "inserts of the class": lambda session, house: session.execute(insert(house.note), [{"id": "2"}, {"id": "3"}]),
    "insert into the table": lambda session, house: session.execute(insert(house.note.__table__).values(id="2")),
    "update with returning": lambda session, house: session.scalars(
        update(house.note).values(title="x").returning(house.note)
    ),
    "Query.update": lambda session, house: session.query(house.note).update({"title": "x"}),
    "Query.delete": lambda session, house: session.query(house.note).delete(),
    "bulk_save_objects": lambda session, house: session.bulk_save_objects([house.note(id="2")]),
    "bulk_insert_mappings": lambda session, house: session.bulk_insert_mappings(house.note, [{"id": "2"}]),
    "bulk_update_mappings": lambda session, house: session.bulk_update_mappings(
        house.note, [{"id": "1", "title": "x"}]
    ),
}


@pytest.mark.parametrize("write", BULK)
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_bulk_write_of_a_tracked_class_is_refused_and_says_what_to_call(
    house: House, write: str, kind: str
) -> None:
    """A6; the session and its transaction stay usable."""
    async with opened(house, kind) as (session, run):
        session.add(house.note(id="1", title="a"))
        with pytest.raises(UntrackedWrite, match="execute_recorded"):
            await run(lambda: BULK[write](session, house))
        session.add(house.note(id="9"))
    assert await house.rows("select id, title from note order by id") == [("1", "a"), ("9", None)]
    assert sorted(await house.events()) == [("create", "1"), ("create", "9")]


@asynccontextmanager
async def opened(house: House, kind: str) -> AsyncIterator[tuple[Any, Callable[[Callable[[], Any]], Any]]]:
    """Yield the synchronous face of a session in a transaction, and how to run code on it."""
    if kind == "sync":
        with house.manager.sync_session(house.engine) as session, session.begin():

            async def run(step: Callable[[], Any]) -> Any:
                return step()

            yield session, run
    else:
        async with house.manager.session() as session, session.begin():
            yield session.sync_session, lambda step: session.run_sync(lambda _: step())


async def test_bulk_writes_of_what_nobody_tracks_pass(house: House) -> None:
    async with house.manager.session() as session, session.begin():
        await session.execute(insert(house.other), [{"id": "1"}, {"id": "2"}])
        await session.execute(update(house.other).values(title="x"))
        await session.execute(delete(house.other.__table__).where(house.other.id == "2"))
        await session.execute(text("select 1"))
    assert await house.rows("select id, title from other") == [("1", "x")]
    assert await house.events() == []


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_execute_recorded_writes_one_event_per_row(house: House, kind: str) -> None:
    """A6: 2,500 rows in pages, of the class and of its table, and the contents are those after the change."""
    names = [f"{number:04}" for number in range(2_500)]
    async with opened(house, kind) as (session, run):
        session.add_all(house.note(id=name, title="a") for name in names)
        assert await run(lambda: session.execute_recorded(update(house.note).values(title="b"))) == 2_500
    assert await contents(house, "update") == dict.fromkeys(names, "b")
    async with opened(house, kind) as (session, run):
        some = delete(house.note).where(house.note.id >= "0100")
        assert await run(lambda: session.execute_recorded(some)) == 2_400
        assert await run(lambda: session.execute_recorded(some)) == 0
    assert await contents(house, "delete") == dict.fromkeys(names[100:])
    assert await house.rows("select count(*) from note") == [(100,)]


async def contents(house: House, operation: str) -> dict[str, str]:
    query = f"select resource_id, content ->> 'title' from outbox where operation = '{operation}' order by event_id"
    found = await house.rows(query)
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_execute_recorded_takes_the_form_in_which_a_bulk_write_was_refused(house: House, kind: str) -> None:
    """The refusal of a table's update names this call, so the call must do it."""
    async with opened(house, kind) as (session, run):
        session.add(house.note(id="1", title="a"))
        assert await run(lambda: session.execute_recorded(update(house.note.__table__).values(title="b"))) == 1
        assert await run(lambda: session.execute_recorded(delete(house.note.__table__))) == 1
    assert await house.events() == [("create", "1"), ("update", "1"), ("delete", "1")]


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_execute_recorded_refuses_what_it_cannot_record(house: House, kind: str) -> None:
    """An insert above all: it must not leave deletes."""
    async with opened(house, kind) as (session, run):
        for statement in (insert(house.note).values(id="1"), update(house.other).values(title="x"), select(house.note)):
            with pytest.raises(UntrackedWrite, match="update\\(\\) or delete\\(\\)"):
                await run(lambda statement=statement: session.execute_recorded(statement))
    assert await house.events() == []
    assert await house.rows("select id from note") == []


@pytest.mark.parametrize("kind", ["plain", "plain async", "of another manager"])
async def test_another_session_that_writes_a_tracked_class_is_refused(house: House, kind: str) -> None:
    """A6: no session of the process can write it and leave no event."""
    stranger = SyncManager(house.manager.engine, config=SyncConfig(doorbell=False))
    session = {
        "plain": lambda: Session(house.engine),
        "plain async": lambda: AsyncSession(house.manager.engine),
        "of another manager": stranger.session,
    }[kind]()
    session.add(house.note(id="1"))
    with pytest.raises(UntrackedWrite, match="Note is tracked"):
        await session.commit() if isinstance(session, AsyncSession) else session.commit()
    await session.close() if isinstance(session, AsyncSession) else session.close()
    assert await house.rows("select id from note") == []


async def test_recorded_events_come_after_the_rows_of_their_flush_in_the_order_of_the_calls(house: House) -> None:
    """O2, A10."""
    one, two, three = (SyncEvent.create("Loose", name, {}) for name in ("one", "two", "three"))
    async with house.manager.session() as session, session.begin():
        session.record(one)
        session.add(house.note(id="row"))
        session.record([two], three)
    assert await house.events() == [("create", "row"), ("create", "one"), ("create", "two"), ("create", "three")]


async def test_a_query_flushes_rows_and_events_alike(house: House) -> None:
    """Autoflush: what the query sees has its events before it."""
    async with house.manager.session() as session, session.begin():
        session.add(house.note(id="1"))
        session.record(SyncEvent.create("Loose", "2", {}))
        assert (await session.scalars(select(house.note.id))).all() == ["1"]
        seen = await session.scalars(text("select resource_id from outbox order by event_id"))
        assert seen.all() == ["1", "2"]


@pytest.mark.parametrize("count", [1, 40, 1_000])
async def test_a_flush_records_with_one_statement(house: House, count: int) -> None:
    statements: list[str] = []
    engine_event.listen(
        house.manager.engine.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2])
    )
    async with house.manager.session() as session, session.begin():
        session.add_all(house.note(id=f"{number}") for number in range(count))
        await session.flush()
    recording = [statement for statement in statements if "outbox_delivery" in statement]
    assert len(recording) == 1
    assert len(await house.events()) == count
