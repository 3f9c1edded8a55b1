"""Guarantee 11: what belongs to a comparison and what does not: tenants, types, classes, and what one side only has."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from sqlalchemy import Text, text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox import MemorySecondary, Registration, SyncEvent, UnknownSecondary
from outbox.content import fingerprint
from outbox.errors import SettingsError
from outbox.secondaries.base import Retry, Summary
from outbox.secondaries.sql import SqlSecondary
from tests.comparing import NORTH, Interrupted, Note, World, said
from tests.relaying import execute, hold_of, manager_of, rows
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

# Any text that PostgreSQL takes, in pieces that make line feeds and quotes likely.
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.sampled_from("\n'\"\\{}é😀")
TEXTS = st.text(LETTERS, max_size=30)


class Base(DeclarativeBase): ...


class Animal(Base):
    """A class whose subclasses share its table; one of them is tracked for itself."""

    __tablename__ = "animal"
    number: Mapped[str] = mapped_column(Text(collation="C"), primary_key=True)
    kind: Mapped[str] = mapped_column(Text)
    content: Mapped[str] = mapped_column(Text)
    __mapper_args__: ClassVar[Any] = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}


class Cat(Animal):
    __mapper_args__: ClassVar[Any] = {"polymorphic_identity": "cat"}


class Dog(Animal):
    __mapper_args__: ClassVar[Any] = {"polymorphic_identity": "dog"}


def invented(secondary: MemorySecondary, tenant: str, name: str, resource_type: str = "Note") -> None:
    event = SyncEvent.create(resource_type, name, said("invented"), tenant_id=tenant)
    secondary.held[event.key] = replace(event, position=1)


async def test_one_that_nobody_registered_is_refused(primary: AsyncEngine) -> None:
    """Nothing is ever owed to it, so every comparison would find everything missing."""
    world = World(primary, Interrupted("mirror"))
    with pytest.raises(UnknownSecondary):
        await world.reconcile()


async def test_only_the_tenants_and_types_it_wants_are_compared(primary: AsyncEngine) -> None:
    """What a secondary is never sent is not missing there; the row in the notes says what was asked."""
    terms = Registration(Interrupted("mirror"), tenant_ids=["north"], resource_types=["Note"])
    world = await World(primary, terms).open()
    for tenant in ("north", "south"):
        await world.write(["1", "2"], tenant=tenant)
    await world.relay()
    found = await world.reconcile()
    assert (found.in_sync, found.primary_count) == (True, 2)
    assert (await world.reconcile("south")).primary_count == 0
    assert (await world.reconcile("north", "Note")).primary_count == 2
    notes = await rows(primary, "select tenant_id, resource_type from outbox_reconciliation order by started_at")
    assert [tuple(note.values()) for note in notes] == [(None, None), ("south", None), ("north", "Note")]


async def test_a_tenant_that_only_the_secondary_has_is_found(primary: AsyncEngine) -> None:
    """R5: also where the primary lists no such tenant; types that are not tracked are somebody else's."""
    world = await World(primary, Interrupted("mirror")).open()
    await world.write(["1"])
    await world.relay()
    invented(world.secondary, "nowhere", "1")
    invented(world.secondary, "nowhere", "1", "Other")
    found = await world.reconcile(repair=True)
    assert [(drift.kind, drift.tenant_id) for drift in found.samples] == [("extra", "nowhere")]
    await world.relay()
    assert (await world.reconcile()).in_sync
    assert ("nowhere", "Other", "1") in world.secondary.held


@pytest.mark.parametrize("content", [Animal.content, lambda animal: animal.content], ids=["text column", "function"])
async def test_a_subclass_that_is_tracked_for_itself_does_not_mix_with_its_base(
    primary: AsyncEngine, content: Any
) -> None:
    """R5: its rows are extra under the base's type, and missing under their own."""
    secondary = MemorySecondary("mirror")
    manager = manager_of(primary, secondary)
    manager.track(Animal, content=content)
    manager.track(Cat, content=content)
    async with primary.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await manager.register()
    async with manager.session() as session, session.begin():
        session.add_all([Animal(number="1", content=said("animal")), Cat(number="2", content=said("cat"))])
        session.add(Dog(number="3", content=said("dog")))
    await manager.relay().drain()
    assert sorted(key[1:] for key in secondary.held) == [("Animal", "1"), ("Animal", "3"), ("Cat", "2")]
    found = await manager.reconcile("mirror")
    assert (found.in_sync, found.primary_count, found.secondary_count) == (True, 3, 3)
    cat = secondary.held.pop(("default", "Cat", "2"))
    secondary.held["default", "Animal", "2"] = replace(cat, resource_type="Animal")
    found = await manager.reconcile("mirror", repair=True)
    assert sorted((drift.kind, drift.resource_type) for drift in found.samples) == [
        ("extra", "Animal"),
        ("missing", "Cat"),
    ]
    await manager.relay().drain()
    assert (await manager.reconcile("mirror")).in_sync


async def test_what_fails_or_waits_is_in_flight_and_says_why(primary: AsyncEngine) -> None:
    """R4: a key that is retried, one that is owed while it is paused, and the forged one beside them."""
    world = await World(primary, ScriptedSecondary("mirror"), retry_initial=60, retry_max=60).open()
    await world.write(["1", "2", "3"])
    await world.relay()
    world.secondary.always("1", Retry("busy"))
    await world.write(["1"], "second")
    await world.manager.relay().run_once("mirror")
    await eventually(lambda: hold_of(primary, "1"))
    await world.manager.pause("mirror")
    await world.write(["2"], "second")
    forged = (*NORTH, "3")
    world.secondary.held[forged] = replace(world.secondary.held[forged], content=said("forged"))
    found = await world.reconcile(patience=timedelta(seconds=0.2))
    assert [(drift.resource_id, drift.kind) for drift in found.samples] == [("3", "altered")]
    assert (found.in_flight, found.in_flight_why) == (2, {"failing": 1, "owed": 1})


async def test_what_changed_without_an_event_is_drift(primary: AsyncEngine) -> None:
    """A6: an update, a delete and an insert that went by the session are found, and repaired from the rows."""
    world = await World(primary, Interrupted("mirror")).open()
    await world.write(["1", "2", "3"])
    await world.relay()
    await execute(primary, "update note set content = :content where number = '1'", content=said("raw"))
    await execute(primary, "delete from note where number = '2'")
    await execute(primary, "insert into note values ('north', '4', :content)", content=said("raw"))
    found = await world.reconcile(repair=True)
    kinds = {drift.resource_id: drift.kind for drift in found.samples}
    assert kinds == {"1": "altered", "2": "extra", "4": "missing"}
    await world.relay()
    assert (await world.reconcile()).in_sync
    assert world.secondary.content_of("Note", "1", tenant_id="north") == said("raw")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(notes=st.dictionaries(TEXTS.filter(bool), TEXTS, min_size=1, max_size=12))
@example(notes={"a\nb": "c", "a": "b\nc", "\r\n": "\n"})
async def test_the_database_sums_up_what_we_sum_up(primary: AsyncEngine, notes: dict[str, str]) -> None:
    """R6: the same number for the same id and content on both sides, whatever the text, and for parts of a range."""
    world = World(primary, SqlSecondary("copy", primary))
    async with primary.begin() as connection:
        await connection.run_sync(Note.metadata.create_all)
        await connection.execute(text("truncate note"))
        for name, content in notes.items():
            await connection.execute(text("insert into note values ('north', :n, :c)"), {"n": name, "c": content})
    await world.secondary.apply([])
    _ = [seen async for seen in world.secondary.scan("nobody", "Note")]
    await execute(primary, "truncate outbox_resources")
    await execute(
        primary,
        "insert into outbox_resources (tenant_id, resource_type, resource_id, position, content)"
        " select tenant_id, 'Note', number, 1, content from note",
    )
    names = sorted(notes, key=str.encode)
    for after, through in ((None, None), (names[0], None), (None, names[len(names) // 2]), (names[0], names[-1])):
        inside = [name for name in names if _within(name, after, through)]
        expected = Summary(len(inside), sum(fingerprint(name, notes[name]) for name in inside))
        assert await world.source.summarise(*NORTH, after, through) == expected
        assert await world.secondary.summarise(*NORTH, after, through) == expected


def _within(name: str, after: str | None, through: str | None) -> bool:
    above = after is None or name.encode() > after.encode()
    return above and (through is None or name.encode() <= through.encode())


@pytest.mark.parametrize("terms", [{"reason": "x" * 1_025}, {"actor": "\x00"}, {"most_deletes": 1.5}])
async def test_terms_that_cannot_be_written_down_are_refused_before_anything_is_compared(
    primary: AsyncEngine, terms: dict[str, Any]
) -> None:
    """Promise 13: not after the repairs, when the note is written."""
    manager = manager_of(primary, MemorySecondary("mirror"))
    with pytest.raises(SettingsError):
        await manager.reconcile("mirror", repair=True, **terms)
