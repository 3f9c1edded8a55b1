"""Guarantee 11: what a content is put together from may lie in other tables, however it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import ForeignKey, Text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from outbox import MemorySecondary
from outbox.errors import NotForgotten
from tests.comparing import said
from tests.relaying import manager_of

# As the default, with the statement that reads the owner, and in one of their own.
LOADED = ("select", "joined", "selectin")


def tables(lazy: str) -> tuple[Any, Any, Any]:
    """Return a base, a class of owners, and one of the parts they are made of, loaded in this way."""

    class Base(DeclarativeBase): ...

    class Part(Base):
        __tablename__ = "part"
        name: Mapped[str] = mapped_column(Text, primary_key=True)
        owner: Mapped[str] = mapped_column(ForeignKey("owner.number"))

    class Owner(Base):
        __tablename__ = "owner"
        number: Mapped[str] = mapped_column(Text(collation="C"), primary_key=True)
        parts: Mapped[list[Part]] = relationship(Part, lazy=lazy)

    return Base, Owner, Part


def whole(owner: Any) -> dict[str, Any]:
    """The content of an owner."""
    return {"parts": sorted(part.name for part in owner.parts)}


def by_function(owner: Any) -> str:
    """What no index finds."""
    return f"urn:{owner.number}"


@pytest.mark.parametrize(
    ("lazy", "identity"),
    [*((lazy, None) for lazy in LOADED), ("select", by_function), ("selectin", by_function)],
)
async def test_parts_are_compared_and_restored(
    primary: AsyncEngine, lazy: str, identity: Callable[[Any], str] | None
) -> None:
    """R1, R5: for a comparison and a repair as for the capture, whichever way SQLAlchemy is told to load them."""
    base, owner, part = tables(lazy)
    secondary = MemorySecondary("mirror")
    manager = manager_of(primary, secondary)
    manager.track(owner, resource_type="Owner", content=whole, resource_id=identity)
    async with primary.begin() as connection:
        await connection.run_sync(base.metadata.create_all)
    await manager.register()
    async with manager.session() as session, session.begin():
        for number in "123":
            session.add(owner(number=number, parts=[part(name=f"{number}{letter}") for letter in "ab"]))
    await manager.relay().drain()
    assert (await manager.reconcile("mirror")).in_sync

    key = ("default", "Owner", "2" if identity is None else "urn:2")
    before = secondary.held.pop(key)
    assert before.content != said("first")
    story = await manager.why("Owner", key[2])
    assert (story.primary.present, [each.copy.equal for each in story.secondaries]) == (True, [False])
    found = await manager.reconcile("mirror", repair=True)
    assert (found.missing, found.primary_count) == (1, 3)
    await manager.relay().drain()
    assert secondary.held[key].content == before.content == '{"parts":["2a","2b"]}'
    story = await manager.why("Owner", key[2])
    assert [each.copy.equal for each in story.secondaries] == [True]
    with pytest.raises(NotForgotten):
        await manager.forget("Owner", key[2])
