"""Promise 1: whatever a flush makes of a resource's name, what is no more leaves its delete, and the rest is there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Column, ForeignKey, Integer, Text, text, update
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import declarative_base, relationship, synonym

from outbox import MemorySecondary, SyncConfig, SyncManager, UntrackedWrite


def mapped() -> SimpleNamespace:
    """Return classes of this test alone: what is tracked once is tracked in the whole process."""
    base = declarative_base()

    class Note(base):
        __tablename__ = "note"
        id = Column(Integer, primary_key=True)
        tenant = Column(Text, nullable=False, default="a")
        code = Column(Text, nullable=False)
        other_code = synonym("code")
        lines = relationship("Line")

        @property
        def by_property(self) -> str:
            return f"urn:{self.code}"

        @hybrid_property
        def by_hybrid(self) -> str:
            return "urn:" + self.code

    class Line(base):
        __tablename__ = "line"
        id = Column(Integer, primary_key=True)
        note_id = Column(ForeignKey("note.id"))

    return SimpleNamespace(metadata=base.metadata, Note=Note, Line=Line)


class Desk:
    """A manager that tracks notes in some way, and what its events leave of them."""

    def __init__(self, primary: AsyncEngine, **mapping: Any) -> None:
        self.manager = SyncManager(primary, [MemorySecondary()], config=SyncConfig(doorbell=False))
        self.classes = mapped()
        self.note: Any = self.classes.Note
        given = {"tenant": self.note.tenant, "resource_id": self.note.code} | mapping
        self.manager.track(self.note, **given)

    async def open(self, **codes: str) -> Desk:
        """Make the tables, and notes of tenant a by id and code."""
        async with self.manager.engine.begin() as connection:
            await connection.run_sync(self.classes.metadata.create_all)
        await self.manager.register()
        async with self.manager.session() as session, session.begin():
            session.add_all([self.note(id=int(number[1:]), code=code) for number, code in codes.items()])
        return self

    async def left(self) -> set[tuple[str, str]]:
        """Tenant and id of what a secondary would hold that applies all events in their order."""
        async with self.manager.engine.connect() as connection:
            rows = await connection.execute(
                text("select tenant_id, resource_id, operation from outbox order by event_id")
            )
            latest = {(row.tenant_id, row.resource_id): row.operation for row in rows}
        return {key for key, operation in latest.items() if operation != "delete"}


async def test_a_new_row_in_the_name_of_one_that_is_deleted_stays(primary: AsyncEngine) -> None:
    """SQLAlchemy inserts before it deletes, so the delete came last and took the new one away."""
    desk = await Desk(primary).open(_1="x")
    async with desk.manager.session() as session, session.begin():
        await session.delete(await session.get(desk.note, 1))
        session.add(desk.note(id=2, code="x"))
    assert await desk.left() == {("a", "x")}


async def test_rows_that_pass_their_names_on_keep_all_that_are_there(primary: AsyncEngine) -> None:
    """One took the other's name, and the delete of that name came after it."""
    desk = await Desk(primary).open(_1="a", _2="b", _3="z")
    async with desk.manager.session() as session, session.begin():
        first, second = await session.get(desk.note, 1), await session.get(desk.note, 2)
        first.code, second.code = "b", "c"
    assert await desk.left() == {("a", "b"), ("a", "c"), ("a", "z")}


@pytest.mark.parametrize("known", [True, False], ids=["loaded before", "expired before"])
async def test_a_row_that_is_changed_and_deleted_leaves_the_delete_of_what_it_was(
    primary: AsyncEngine, known: bool
) -> None:
    desk = await Desk(primary).open(_1="x")
    async with desk.manager.session() as session:
        row = await session.get(desk.note, 1)
        if not known:
            await session.commit()
        row.tenant, row.code = "b", "y"
        await session.delete(row)
        await session.commit()
    assert await desk.left() == set()


async def test_a_row_that_takes_the_place_of_a_deleted_one_leaves_nothing_of_it(primary: AsyncEngine) -> None:
    """One UPDATE, by which the row is another resource, of another tenant."""
    desk = await Desk(primary).open(_1="x")
    async with desk.manager.session() as session, session.begin():
        await session.delete(await session.get(desk.note, 1))
        session.add(desk.note(id=1, tenant="b", code="y"))
    assert await desk.left() == {("b", "y")}


@pytest.mark.parametrize("named", ["by_property", "by_hybrid", "other_code"])
async def test_a_name_that_is_computed_is_computed_of_what_the_row_was(primary: AsyncEngine, named: str) -> None:
    desk = await Desk(primary, resource_id=lambda note: getattr(note, named)).open(_1="x")
    before = await desk.left()
    async with desk.manager.session() as session, session.begin():
        (await session.get(desk.note, 1)).code = "y"
    (left,) = await desk.left()
    assert left not in before
    assert left[1].endswith("y")


MOVES: dict[str, Callable[[Any], Any]] = {
    "a tenant": lambda note: update(note).values(tenant="b"),
    "a resource id": lambda note: update(note).values({note.code: "y"}),
    "a primary key": lambda note: update(note).values(id=7),
    "of the table": lambda note: update(note.__table__).values(code="y"),
}


@pytest.mark.parametrize("what", MOVES)
async def test_a_bulk_update_of_what_resources_go_by_is_refused(primary: AsyncEngine, what: str) -> None:
    """Its rows come back as what they have become; nobody would delete what they were."""
    desk = await Desk(primary).open(_1="x")
    async with desk.manager.session() as session, session.begin():
        with pytest.raises(UntrackedWrite, match="is what resources of Note go by; change the objects"):
            await session.execute_recorded(MOVES[what](desk.note))
    assert await desk.left() == {("a", "x")}


async def test_what_a_content_takes_from_other_rows_is_read_after_they_are_written(primary: AsyncEngine) -> None:
    """The check before the flush must not keep what it read: the event would be of the rows as they were."""
    desk = Desk(primary, content=lambda row: {"lines": sorted(each.id for each in row.lines)})
    note, line = desk.classes.Note, desk.classes.Line
    await desk.open(_1="x")
    async with desk.manager.session() as session, session.begin():
        session.add(line(id=1, note_id=1))
    async with desk.manager.session() as session, session.begin():
        changed, gone = await session.get(note, 1), await session.get(line, 1)
        changed.code = "y"
        session.add(line(id=2, note_id=1))
        await session.delete(gone)
    async with primary.connect() as connection:
        newest = "select cast(content as text) from outbox where resource_id = 'y'"
        assert (await connection.execute(text(newest))).scalar_one() == '{"lines":[2]}'
