"""Promise 1 where recording fails or is used wrongly: no change without its event, and no event without its change."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Column, Float, Text, create_engine, text, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import declarative_base
from sqlalchemy.pool import NullPool

from outbox import (
    InvalidEvent,
    MemorySecondary,
    NoSecondary,
    NotInTransaction,
    OutboxError,
    OutboxSession,
    SyncConfig,
    SyncEvent,
    SyncManager,
    record,
)

LOOSE = SyncEvent.create("Loose", "1", {})


def note_class() -> type[Any]:
    class Note(declarative_base()):
        __tablename__ = "note"
        id = Column(Text, primary_key=True)
        score = Column(Float)

    return Note


@pytest.fixture
async def note(primary: AsyncEngine) -> type[Any]:
    made = note_class()
    async with primary.begin() as connection:
        await connection.run_sync(made.metadata.create_all)
    return made


def manager_of(engine: AsyncEngine, note: type[Any]) -> SyncManager:
    made = SyncManager(engine, [MemorySecondary()], config=SyncConfig(doorbell=False))
    made.track(note)
    return made


@pytest.fixture
async def manager(primary: AsyncEngine, note: type[Any]) -> SyncManager:
    made = manager_of(primary, note)
    await made.register()
    return made


async def stored(engine: AsyncEngine) -> tuple[list[Any], list[Any]]:
    """Return the ids of all notes, and the resource ids of all events."""
    async with engine.connect() as connection:
        notes = (await connection.execute(text("select id from note order by id"))).scalars().all()
        events = (await connection.execute(text("select resource_id from outbox order by event_id"))).scalars().all()
    return list(notes), list(events)


async def break_the_outbox(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("alter table outbox add constraint broken check (resource_id <> 'broken')"))


async def test_a_session_whose_event_cannot_be_inserted_cannot_commit_its_row(
    primary: AsyncEngine, manager: SyncManager, note: type[Any]
) -> None:
    """A3: the caller swallows every error and commits on and on."""
    await break_the_outbox(primary)
    async with manager.session() as session:
        session.add(note(id="broken"))
        with pytest.raises(DBAPIError):
            await session.flush()
        for _ in range(2):
            with suppress(SQLAlchemyError):
                await session.commit()
    assert await stored(primary) == ([], [])


async def test_a_session_whose_recorded_event_cannot_be_inserted_cannot_commit_its_row(
    primary: AsyncEngine, manager: SyncManager, note: type[Any]
) -> None:
    """A3, with an event that is only written at the commit."""
    await break_the_outbox(primary)
    async with manager.session() as session:
        session.add(note(id="row"))
        session.record(SyncEvent.create("Loose", "broken", {}))
        for _ in range(3):
            with suppress(SQLAlchemyError):
                await session.commit()
    assert await stored(primary) == ([], [])


async def test_a_failed_record_on_a_raw_connection_fails_its_transaction(
    primary: AsyncEngine, manager: SyncManager, note: type[Any]
) -> None:
    """A3: PostgreSQL itself lets nothing of the transaction through (25P02)."""
    await break_the_outbox(primary)
    url = primary.url.set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(url)
    try:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("insert into note values ('row')")
        with pytest.raises(asyncpg.CheckViolationError):
            await record(connection, SyncEvent.create("Loose", "broken", {}))
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await record(connection, LOOSE)
        await transaction.commit()
    finally:
        await connection.close()
    assert await stored(primary) == ([], [])


async def test_an_empty_registry_keeps_the_row_out_too(primary: AsyncEngine, note: type[Any]) -> None:
    """A3."""
    async with manager_of(primary, note).session() as session:
        session.add(note(id="row"))
        with pytest.raises(NoSecondary):
            await session.flush()
        with suppress(SQLAlchemyError):
            await session.commit()
    assert await stored(primary) == ([], [])


async def test_execute_recorded_that_refuses_one_row_takes_its_update_back(
    primary: AsyncEngine, manager: SyncManager, note: type[Any]
) -> None:
    """A3, A4: the refusal is typed, and the transaction goes on without the update."""
    async with manager.session() as session:
        async with session.begin():
            session.add_all([note(id="1", score=1.0), note(id="2", score=2.0)])
        async with session.begin():
            with pytest.raises(InvalidEvent, match=r"^content\.score: "):
                await session.execute_recorded(update(note).values(score=float("inf")))
            session.add(note(id="3"))
    assert await stored(primary) == (["1", "2", "3"], ["1", "2", "3"])
    async with primary.connect() as connection:
        assert (await connection.execute(text("select max(score) from note"))).scalar_one() == 2.0


async def _add(session: OutboxSession, note: type[Any]) -> None:
    session.add(note(id="row"))
    await session.flush()


async def _update_in_bulk(session: OutboxSession, note: type[Any]) -> None:
    await session.execute_recorded(update(note).values(score=2.0))


async def _record(session: OutboxSession, _: type[Any]) -> None:
    session.record(LOOSE)
    await session.commit()


@pytest.mark.parametrize("write", [_add, _update_in_bulk, _record])
async def test_an_engine_in_autocommit_gets_neither_row_nor_event(
    primary: AsyncEngine, note: type[Any], write: Callable[..., Any]
) -> None:
    """A5: refused before any SQL, because a row would stay whatever becomes of its event."""
    engine = create_async_engine(primary.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    manager = manager_of(engine, note)
    await manager.register()
    async with primary.begin() as connection:
        await connection.execute(text("insert into note values ('before', 1.0)"))
    async with manager.session() as session:
        with pytest.raises(NotInTransaction):
            await write(session, note)
    assert await stored(primary) == (["before"], [])
    async with primary.connect() as connection:
        assert (await connection.execute(text("select score from note"))).scalars().all() == [1.0]


async def test_a_session_whose_rows_go_to_another_engine_is_refused(
    primary: AsyncEngine, manager: SyncManager, note: type[Any]
) -> None:
    """A5: two binds are two transactions, and one may commit without the other."""
    url = primary.url.set(drivername="postgresql+psycopg")
    one, other = (create_engine(url, poolclass=NullPool) for _ in range(2))
    with pytest.raises(OutboxError), manager.sync_session(one, binds={note: other}) as session, session.begin():
        session.add(note(id="row"))
    assert await stored(primary) == ([], [])


async def _roll_back(session: OutboxSession) -> None:
    await session.rollback()


async def _close(session: OutboxSession) -> None:
    await session.close()


async def _reset(session: OutboxSession) -> None:
    await session.reset()


@pytest.mark.parametrize("end", [_roll_back, _close, _reset])
@pytest.mark.parametrize("begun", [False, True], ids=["not begun", "begun"])
async def test_what_was_recorded_ends_with_its_transaction(
    primary: AsyncEngine, manager: SyncManager, end: Callable[[OutboxSession], Any], begun: bool
) -> None:
    """A1: not a word of it in the session's next transaction."""
    async with manager.session() as session:
        if begun:
            await session.begin()
        session.record(SyncEvent.create("Loose", "given up", {}))
        await end(session)
        session.record(LOOSE)
        await session.commit()
    assert await stored(primary) == ([], ["1"])


async def test_a_block_that_fails_takes_what_was_recorded_along(primary: AsyncEngine, manager: SyncManager) -> None:
    """A2: caught outside, with the transaction going on."""
    async with manager.session() as session, session.begin():
        session.record(SyncEvent.create("Loose", "before", {}))
        with suppress(LookupError):
            async with session.begin_nested():
                session.record(SyncEvent.create("Loose", "in the block", {}))
                raise LookupError
        session.record(SyncEvent.create("Loose", "after", {}))
    assert await stored(primary) == ([], ["before", "after"])
