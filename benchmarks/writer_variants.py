"""The ways to write one business row, with and without its event: what `writer_overhead` compares.

By hand, the same rows with the same columns and the same expressions go out in one prepared statement, which knows the
secondaries beforehand. A variant is made once per connection and then called with one number after another.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import asyncpg
from sqlalchemy import BigInteger, Text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.ground import CONTENT
from outbox import SyncEvent, SyncManager, record

BUSINESS_TABLE = "create table business (id bigint primary key, content text not null)"
BUSINESS = "insert into business (id, content) values ($1, $2)"
BY_HAND = """
with event as (
    insert into outbox
        (tenant_id, resource_type, resource_id, operation, version, fhir_version, content, bulk_id, headers)
    values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
    returning event_id
)
insert into outbox_delivery (backend_id, lane, event_id, key_hash)
select secondary.backend_id, cast(hashtextextended($1, 0) & 63 as smallint), event.event_id,
       hashtextextended($1 || '/' || $2 || '/' || $3, 0)
from event cross join (values {secondaries}) as secondary (backend_id)
"""


def mapped() -> type[Any]:
    """Return a class of its own that is mapped to the business table."""

    class Base(DeclarativeBase):
        pass

    class Business(Base):
        __tablename__ = "business"
        id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
        content: Mapped[str] = mapped_column(Text)

    return Business


Business = mapped()


def tracked_by(manager: SyncManager) -> type[Any]:
    """Return a class that only this manager tracks: every manager that does listens to it for ever."""
    entity = mapped()
    manager.track(entity, resource_type="Observation", tenant="tenant-1", content=entity.content)
    return entity


class Ground(NamedTuple):
    """What a variant may use, a class that the manager tracks, and who is owed what is recorded."""

    connection: asyncpg.Connection[Any]
    manager: SyncManager
    tracked: type[Any]
    secondaries: Sequence[str]


Transaction = Callable[[int], Awaitable[Any]]
Variant = Callable[[Ground], Awaitable[Transaction]]


async def bare(ground: Ground) -> Transaction:
    business = await ground.connection.prepare(BUSINESS)

    async def transaction(number: int) -> None:
        async with ground.connection.transaction():
            await business.fetch(number, CONTENT)

    return transaction


async def by_hand(ground: Ground) -> Transaction:
    owed = ", ".join(f"('{name}')" for name in ground.secondaries)
    business = await ground.connection.prepare(BUSINESS)
    event = await ground.connection.prepare(BY_HAND.format(secondaries=owed))

    async def transaction(number: int) -> None:
        async with ground.connection.transaction():
            await business.fetch(number, CONTENT)
            await event.fetch("tenant-1", "Observation", str(number), "update", "1", "4.0", CONTENT, None, None)

    return transaction


async def recorded(ground: Ground) -> Transaction:
    business = await ground.connection.prepare(BUSINESS)
    # Made before, because by hand nothing is checked either.
    events = [_event(number) for number in range(100)]

    async def transaction(number: int) -> None:
        async with ground.connection.transaction():
            await business.fetch(number, CONTENT)
            await record(ground.connection, events[number % 100])

    return transaction


async def checked_and_recorded(ground: Ground) -> Transaction:
    business = await ground.connection.prepare(BUSINESS)

    async def transaction(number: int) -> None:
        async with ground.connection.transaction():
            await business.fetch(number, CONTENT)
            await record(ground.connection, _event(number))

    return transaction


async def plain_session(ground: Ground) -> Transaction:
    async def transaction(number: int) -> None:
        async with AsyncSession(ground.manager.engine) as session, session.begin():
            session.add(Business(id=number, content=CONTENT))

    return transaction


async def session_record(ground: Ground) -> Transaction:
    async def transaction(number: int) -> None:
        async with ground.manager.session() as session, session.begin():
            session.add(Business(id=number, content=CONTENT))
            session.record(_event(number))

    return transaction


async def captured(ground: Ground) -> Transaction:
    async def transaction(number: int) -> None:
        async with ground.manager.session() as session, session.begin():
            session.add(ground.tracked(id=number, content=CONTENT))

    return transaction


def _event(number: int) -> SyncEvent:
    return SyncEvent.update("Observation", str(number), CONTENT, tenant_id="tenant-1", version="1", fhir_version="4.0")


VARIANTS: dict[str, Variant] = {
    variant.__name__: variant
    for variant in (bare, by_hand, recorded, checked_and_recorded, plain_session, session_record, captured)
}
