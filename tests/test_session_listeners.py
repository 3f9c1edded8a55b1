"""The sessions beside an application's own listeners and its own ways to open a savepoint, and beside inheritance."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Column, Text, create_engine, delete, event, text, update
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session, declarative_base
from sqlalchemy.pool import NullPool

from outbox import SyncManager, UntrackedWrite
from tests.relaying import change, manager_of
from tests.scripted import ScriptedSecondary


def classes() -> tuple[type[Any], type[Any]]:
    """Return a class and a subclass of it, both in one table."""
    base = declarative_base()

    class Animal(base):
        __tablename__ = "animal"
        id = Column(Text, primary_key=True)
        kind = Column(Text, nullable=False)
        name = Column(Text)
        __mapper_args__ = {"polymorphic_on": kind, "polymorphic_identity": "animal"}  # noqa: RUF012 - as SQLAlchemy has it

    class Cat(Animal):
        __mapper_args__ = {"polymorphic_identity": "cat"}  # noqa: RUF012 - as SQLAlchemy has it

    return Animal, Cat


async def opened(primary: AsyncEngine, *tracked: type[Any]) -> SyncManager:
    manager = manager_of(primary, ScriptedSecondary("search"), doorbell=False)
    for each in tracked:
        manager.track(each)
    await manager.register()
    async with primary.begin() as connection:
        for each in tracked[:1]:
            await connection.run_sync(each.metadata.create_all)
    return manager


async def events(primary: AsyncEngine) -> list[tuple[str, str]]:
    """Operation and resource of every event, in order."""
    query = "select operation, resource_type || '/' || resource_id from outbox order by event_id"
    async with primary.connect() as connection:
        return [(row[0], row[1]) for row in await connection.execute(text(query))]


@pytest.mark.parametrize("rows", [0, 1])
async def test_what_a_listener_records_before_the_commit_is_written(primary: AsyncEngine, rows: int) -> None:
    """An application's audit: it is asked after we are, and its event went with the transaction."""
    animal, _ = classes()
    manager = await opened(primary, animal)
    async with manager.session() as session:

        @event.listens_for(session.sync_session, "before_commit")
        def audit(inner: Any) -> None:
            inner.add_all([animal(id="late") for _ in range(rows)])
            inner.record(change("audit"))

        session.record(change("first"))
        await session.commit()
        token = session.token
        session.record(change("second"))
        await session.rollback()
    late = [("create", "Animal/late")] * rows
    assert await events(primary) == [("update", "Thing/first"), *late, ("update", "Thing/audit")]
    assert token is not None
    assert len(token.positions) == 2 + rows


async def test_what_is_recorded_in_the_last_flush_comes_after_its_rows(primary: AsyncEngine) -> None:
    animal, _ = classes()
    manager = await opened(primary, animal)
    async with manager.session() as session:

        @event.listens_for(session.sync_session, "before_commit")
        def late(inner: Any) -> None:
            inner.add(animal(id="1", kind="animal"))

        @event.listens_for(session.sync_session, "before_flush")
        def audit(inner: Any, *_: Any) -> None:
            inner.record(change("audit"))

        await session.connection()
        await session.commit()
    assert await events(primary) == [("create", "Animal/1"), ("update", "Thing/audit")]


async def test_a_savepoint_that_is_begun_takes_nothing_of_what_was_recorded_before_it(primary: AsyncEngine) -> None:
    """`begin(nested=True)` is `begin_nested`."""
    manager = await opened(primary)
    engine = create_engine(primary.url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
    with manager.sync_session(engine) as session:
        session.record(change("before"))
        savepoint = session.begin(nested=True)
        session.record(change("within"))
        savepoint.rollback()
        session.commit()
    assert await events(primary) == [("update", "Thing/before")]


@pytest.mark.parametrize("operation", ["update", "delete"])
async def test_rows_of_a_bulk_write_are_recorded_as_what_they_are(primary: AsyncEngine, operation: str) -> None:
    """A subclass that is tracked by itself is a resource type of its own, whichever class the statement names."""
    animal, cat = classes()
    manager = await opened(primary, animal, cat)
    statement: Any = update(animal).values(name="x") if operation == "update" else delete(animal)
    async with manager.session() as session, session.begin():
        session.add_all([animal(id="1"), cat(id="2")])
        assert await session.execute_recorded(statement) == 2
    assert set(await events(primary)) == {
        ("create", "Animal/1"),
        ("create", "Cat/2"),
        (operation, "Animal/1"),
        (operation, "Cat/2"),
    }


async def test_a_bulk_write_that_reaches_a_tracked_subclass_is_refused(primary: AsyncEngine) -> None:
    """Its rows would change and leave no event."""
    animal, cat = classes()
    manager = await opened(primary, cat)
    async with manager.session() as session, session.begin():
        session.add(cat(id="2"))
        for statement in (update(animal).values(name="x"), delete(animal)):
            with pytest.raises(UntrackedWrite, match="a bulk write of Cat would leave no event"):
                await session.execute(statement)
            with pytest.raises(UntrackedWrite, match="takes an update"):
                await session.execute_recorded(statement)
        with pytest.raises(UntrackedWrite):
            await session.run_sync(lambda inner: _query(inner, animal))
    assert await events(primary) == [("create", "Cat/2")]


def _query(session: Session, entity: type[Any]) -> None:
    session.query(entity).update({"name": "x"})
