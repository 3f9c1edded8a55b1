"""Promise 1: what a flush writes of a tracked class becomes one event per row, equal to the row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from sqlalchemy import Column, DateTime, ForeignKey, Integer, Text, func, text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import declarative_base, relationship, selectinload

from outbox import MemorySecondary, SyncConfig, SyncManager


def mapped() -> SimpleNamespace:
    """Return classes of this test alone: what is tracked once is tracked in the whole process."""
    base = declarative_base()

    class Note(base):
        __tablename__ = "note"
        id = Column(Text, primary_key=True)
        title = Column(Text)
        count = Column(Integer, nullable=False, default=0)

    class Numbered(base):
        __tablename__ = "numbered"
        id = Column(Integer, primary_key=True)
        made_at = Column(DateTime(timezone=True), server_default=func.now())
        title = Column(Text)

    class Place(base):
        __tablename__ = "place"
        street = Column(Text, primary_key=True)
        door = Column(Text, primary_key=True)

    class Order(base):
        __tablename__ = "shop_order"
        id = Column(Text, primary_key=True)
        lines = relationship("Line", cascade="all, delete-orphan")

    class Line(base):
        __tablename__ = "line"
        id = Column(Text, primary_key=True)
        order_id = Column(ForeignKey("shop_order.id"), nullable=False)

    class Person(base):
        __tablename__ = "person"
        id = Column(Text, primary_key=True)
        kind = Column(Text, nullable=False)
        __mapper_args__: ClassVar = {"polymorphic_on": kind, "polymorphic_identity": "person"}

    class Employee(Person):
        __tablename__ = "employee"
        id = Column(ForeignKey("person.id"), primary_key=True)
        pay = Column(Integer)
        __mapper_args__: ClassVar = {"polymorphic_identity": "employee"}

    return SimpleNamespace(
        metadata=base.metadata, **{each.class_.__name__: each.class_ for each in base.registry.mappers}
    )


@dataclass
class Shop:
    """A primary with mapped tables, and what to look at."""

    primary: AsyncEngine
    classes: SimpleNamespace

    def manager(self, *names: str, **mapping: Any) -> SyncManager:
        made = SyncManager(self.primary, [MemorySecondary()], config=SyncConfig(doorbell=False))
        for name in names:
            made.track(getattr(self.classes, name), **mapping)
        return made

    async def events(self) -> list[tuple[str, str, str, Any]]:
        """Return (operation, type, id, content) of every event, each with the one delivery it must have."""
        columns = "operation, resource_type, resource_id, cast(content as text) as content"
        async with self.primary.connect() as connection:
            found = (await connection.execute(text(f"select {columns}, event_id from outbox order by event_id"))).all()
            owed = (await connection.execute(text("select event_id from outbox_delivery order by event_id"))).all()
        assert [each.event_id for each in found] == [each.event_id for each in owed]
        return [(*each[:3], None if each.content is None else json.loads(each.content)) for each in found]

    async def rows(self, table: str) -> list[dict[str, Any]]:
        async with self.primary.connect() as connection:
            found = await connection.execute(text(f"select cast(to_json(found) as text) from {table} as found"))
            return [json.loads(row) for row in found.scalars()]


@pytest.fixture
async def shop(primary: AsyncEngine) -> Shop:
    made = Shop(primary, mapped())
    async with primary.begin() as connection:
        await connection.run_sync(made.classes.metadata.create_all)
    await made.manager().register()
    return made


def short(events: list[tuple[str, str, str, Any]]) -> list[tuple[str, str]]:
    return [(operation, resource_id) for operation, _, resource_id, _ in events]


def _same(note: Any) -> None:
    note.title = str(note.title)


def _there_and_back(note: Any) -> None:
    note.title, note.title = "other", note.title


def _not_a_column(note: Any) -> None:
    note.nickname = "n"


@pytest.mark.parametrize("change", [_same, _there_and_back, _not_a_column])
async def test_an_update_without_a_net_change_is_no_event(shop: Shop, change: Callable[[Any], None]) -> None:
    async with shop.manager("Note").session() as session:
        async with session.begin():
            session.add(shop.classes.Note(id="1", title="a"))
        async with session.begin():
            note = await session.get(shop.classes.Note, "1")
            change(note)
            session.add(shop.classes.Note(id="2", title="b"))
    assert short(await shop.events()) == [("create", "1"), ("create", "2")]


async def test_changes_of_one_key_in_one_transaction_keep_their_order(shop: Shop) -> None:
    """A10: one event per flush, and a delete between two creates is not hidden."""
    note = shop.classes.Note
    async with shop.manager("Note").session() as session, session.begin():
        row = note(id="1", title="a")
        session.add(row)
        await session.flush()
        row.title = "b"
        row.count = 2
        await session.flush()
        await session.delete(row)
        await session.flush()
        session.add(note(id="1", title="c"))
    found = [(operation, content and content["title"]) for operation, _, _, content in await shop.events()]
    assert found == [("create", "a"), ("update", "b"), ("delete", None), ("create", "c")]


async def test_savepoints_rolled_back_or_released_by_hand_decide_over_their_events(shop: Shop) -> None:
    """A2: three levels, and going on after a partial rollback."""
    note = shop.classes.Note
    async with shop.manager("Note").session() as session, session.begin():
        outer = await session.begin_nested()
        session.add(note(id="kept"))
        middle = await session.begin_nested()
        session.add(note(id="undone"))
        inner = await session.begin_nested()
        session.add(note(id="released, and undone with its parent"))
        await inner.commit()
        await middle.rollback()
        session.add(note(id="after"))
        await outer.commit()
    assert short(await shop.events()) == [("create", "kept"), ("create", "after")]
    assert sorted(row["id"] for row in await shop.rows("note")) == ["after", "kept"]


async def test_parts_of_a_composite_key_cannot_run_into_each_other(shop: Shop) -> None:
    """O7."""
    place = shop.classes.Place
    async with shop.manager("Place").session() as session, session.begin():
        session.add_all([place(street="a/b", door="c"), place(street="a", door="b/c"), place(street="ä", door="%2F")])
    assert {resource_id for _, resource_id in short(await shop.events())} == {"a%2Fb/c", "a/b%2Fc", "%C3%A4/%252F"}


async def test_orphans_and_cascaded_rows_leave_their_deletes(shop: Shop) -> None:
    order, line = shop.classes.Order, shop.classes.Line
    async with shop.manager("Order", "Line").session() as session:
        async with session.begin():
            session.add(order(id="o", lines=[line(id="orphan"), line(id="part")]))
        async with session.begin():
            found = await session.get(order, "o", options=[selectinload(order.lines)])
            del found.lines[[each.id for each in found.lines].index("orphan")]
        async with session.begin():
            await session.delete(await session.get(order, "o"))
    created, deleted = short(await shop.events())[:3], short(await shop.events())[3:]
    assert created[0] == ("create", "o")
    assert set(created[1:]) == {("create", "orphan"), ("create", "part")}
    assert deleted == [("delete", "orphan"), ("delete", "part"), ("delete", "o")]


async def test_a_subclass_of_a_tracked_class_is_tracked(shop: Shop) -> None:
    async with shop.manager("Person").session() as session:
        async with session.begin():
            session.add(shop.classes.Employee(id="e", pay=1))
        async with session.begin():
            (await session.get(shop.classes.Person, "e")).pay = 2
    assert await shop.events() == [
        ("create", "Person", "e", {"id": "e", "kind": "employee", "pay": 1}),
        ("update", "Person", "e", {"id": "e", "kind": "employee", "pay": 2}),
    ]


async def test_a_class_tracked_beside_its_base_leaves_one_event_per_change(shop: Shop) -> None:
    """Exactly one: the nearest of the tracked bases speaks for a row."""
    async with shop.manager("Person", "Employee").session() as session, session.begin():
        session.add_all([shop.classes.Employee(id="e", pay=1), shop.classes.Person(id="p")])
    found = [(kind, resource_id) for _, kind, resource_id, _ in await shop.events()]
    assert sorted(found) == [("Employee", "e"), ("Person", "p")]


async def test_a_class_tracked_by_two_managers_leaves_one_event_per_change(shop: Shop) -> None:
    """Exactly one: a change belongs to the manager whose session made it."""
    first, second = shop.manager("Note"), shop.manager("Note", resource_type="Other")
    async with first.session() as session, session.begin():
        session.add(shop.classes.Note(id="1"))
    async with second.session() as session, session.begin():
        session.add(shop.classes.Note(id="2"))
    assert [(kind, resource_id) for _, kind, resource_id, _ in await shop.events()] == [("Note", "1"), ("Other", "2")]


async def test_a_row_deleted_and_added_again_in_one_flush_is_one_update_equal_to_the_row(shop: Shop) -> None:
    """A row switch: SQLAlchemy writes one UPDATE, and leaves alone what the new object does not name."""
    note = shop.classes.Note
    async with shop.manager("Note").session() as session:
        async with session.begin():
            session.add(note(id="1", title="a", count=7))
        async with session.begin():
            await session.delete(await session.get(note, "1"))
            session.add(note(id="1", title="b"))
    _, switched = await shop.events()
    assert switched == ("update", "Note", "1", (await shop.rows("note"))[0])


async def test_a_row_whose_key_changed_leaves_nothing_behind_under_the_old_one(shop: Shop) -> None:
    """The old resource is deleted and the new one there, or every secondary keeps both for ever."""
    note = shop.classes.Note
    async with shop.manager("Note").session() as session:
        async with session.begin():
            session.add(note(id="old", title="a"))
        async with session.begin():
            (await session.get(note, "old")).id = "new"
    assert resulting(await shop.events()) == {"new": {"id": "new", "title": "a", "count": 0}}


@pytest.mark.parametrize("known", [True, False], ids=["loaded before", "expired before"])
async def test_a_row_that_moved_to_another_resource_id_leaves_nothing_behind(shop: Shop, known: bool) -> None:
    """The same, with a resource id that is not the primary key; a commit expires what an object knew."""
    row = shop.classes.Note(id="1", title="old")
    async with shop.manager("Note", resource_id=lambda note: note.title).session() as session:
        async with session.begin():
            session.add(row)
        async with session.begin():
            if known:
                await session.refresh(row)
            row.title = "new"
    assert set(resulting(await shop.events())) == {"new"}


def resulting(events: list[tuple[str, str, str, Any]]) -> dict[str, Any]:
    held = {resource_id: content for _, _, resource_id, content in events}
    return {resource_id: content for resource_id, content in held.items() if content is not None}


async def test_a_value_computed_by_the_database_is_captured(shop: Shop) -> None:
    """`row.count = Row.count + 1` is how concurrent writers count; the event holds what came out."""
    note = shop.classes.Note
    async with shop.manager("Note").session() as session:
        async with session.begin():
            session.add(note(id="1", title="a", count=7))
        async with session.begin():
            (await session.get(note, "1")).count = note.count + 1
    assert (await shop.events())[-1] == ("update", "Note", "1", {"id": "1", "title": "a", "count": 8})


async def test_a_change_that_only_the_database_computes_is_not_missed(shop: Shop) -> None:
    """The same where the mapping does not object to an expression: the event must be there all the same."""
    note = shop.classes.Note
    async with shop.manager("Note", content=lambda row: {"title": row.title}).session() as session:
        async with session.begin():
            session.add(note(id="1", title="a", count=7))
        async with session.begin():
            (await session.get(note, "1")).count = note.count + 1
    assert short(await shop.events()) == [("create", "1"), ("update", "1")]


async def test_what_only_the_database_gives_is_in_the_event(shop: Shop) -> None:
    """A generated key and a default of the server, through a mapping that cannot do without them."""
    numbered = shop.classes.Numbered
    mapping = {"resource_id": lambda row: f"n{row.id + 0}", "content": lambda row: {"made": row.made_at.isoformat()}}
    async with shop.manager("Numbered", **mapping).session() as session, session.begin():
        session.add_all([numbered(title="generated"), numbered(id=77, title="given")])
    made = {f"n{row['id']}": datetime.fromisoformat(row["made_at"]) for row in await shop.rows("numbered")}
    found = {name: datetime.fromisoformat(content["made"]) for _, _, name, content in await shop.events()}
    assert found == made
