"""Guarantee 11, backfill: whatever the primary key is made of, each row is recorded, and once."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import (
    CHAR,
    Boolean,
    Column,
    Date,
    DateTime,
    Enum,
    Float,
    ForeignKey,
    Integer,
    Interval,
    LargeBinary,
    Numeric,
    String,
    Text,
    TypeDecorator,
    Uuid,
    inspect,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import declarative_base, relationship

from outbox import MemorySecondary, SyncManager
from tests.backfilling import Patient, World, families
from tests.relaying import pending, quick, rows, running, value
from tests.waiting import eventually

LETTERS = ["", "a", "A", "ä", "Z", "z", "\u00df", "ss", "10", "9", "-", " ", "a b", "ab", "\U0001f600", "\u0131", "I"]


class Prefixed(TypeDecorator[str]):
    """Shows `x` as `p-x`."""

    impl = String(40)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return value and value.removeprefix("p-")

    def process_result_value(self, value: str | None, dialect: Any) -> str | None:
        return value and f"p-{value}"


def texts(chance: random.Random) -> str:
    return "".join(chance.choice(LETTERS) for _ in range(3)) + str(chance.randrange(50))


def instants(chance: random.Random) -> datetime:
    return datetime(2020, 1, 1, tzinfo=UTC) + timedelta(microseconds=chance.randrange(10**12))


PARTS: dict[str, tuple[Any, Any]] = {
    "text": (Text, texts),
    "text by bytes": (Text(collation="C"), texts),
    "text by language": (Text(collation="de-x-icu"), texts),
    "text without case": (Text(collation="caseless"), texts),
    "text longer than the model says": (String(2), texts),
    "padded text": (CHAR(30), texts),
    "decorated": (Prefixed, lambda chance: "p-" + texts(chance)),
    "integer": (Integer, lambda chance: chance.randrange(-500, 500)),
    "uuid": (Uuid, lambda chance: UUID(int=chance.getrandbits(128))),
    "instant": (DateTime(timezone=True), instants),
    "date": (Date, lambda chance: date(2020, 1, 1) + timedelta(chance.randrange(900))),
    "number": (Numeric, lambda chance: Decimal(chance.randrange(-(10**9), 10**9)).scaleb(-chance.randrange(6))),
    "float": (Float, lambda chance: chance.choice([-1, 1]) * chance.random() * 10 ** chance.randrange(-9, 9)),
    "bytes": (LargeBinary, lambda chance: chance.randbytes(3)),
    "boolean": (Boolean, lambda chance: chance.random() < 0.5),
    "enumeration": (Enum("z", "a", "m", name="letter"), lambda chance: chance.choice("zam")),
    "interval": (Interval, lambda chance: timedelta(seconds=chance.randrange(10**6))),
}


WITH_ICU = {"text by language", "text without case"}
CASELESS = "create collation if not exists caseless (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"


async def create_collation(connection: AsyncConnection) -> None:
    try:
        await connection.execute(text(CASELESS))
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", "") == "0A000":
            pytest.skip("this PostgreSQL was built without ICU")
        raise


async def thing_of(engine: AsyncEngine, kinds: list[str], chance: random.Random) -> Any:
    """Return a class with a key of these parts, mapped to a table of some forty random rows."""
    base = declarative_base()
    columns = {f"part_{number}": Column(PARTS[kind][0], primary_key=True) for number, kind in enumerate(kinds)}
    thing = type("Thing", (base,), {"__tablename__": f"thing_{len(kinds)}", **columns})
    async with engine.begin() as connection:
        if WITH_ICU.intersection(kinds):
            await create_collation(connection)
        await connection.run_sync(base.metadata.create_all)
        for number, kind in enumerate(kinds):
            if kind == "text longer than the model says":
                await connection.execute(text(f"alter table thing_{len(kinds)} alter part_{number} type text"))
        for _ in range(40):
            parts = {f"part_{number}": PARTS[kind][1](chance) for number, kind in enumerate(kinds)}
            # What a collation takes for equal is one row.
            await connection.execute(insert(thing).values(**parts).on_conflict_do_nothing())
    return thing


def name_of(row: Any) -> str:
    """Every part of the key as Python has it."""
    return repr([getattr(row, column.key) for column in inspect(type(row)).primary_key])


async def recorded(engine: AsyncEngine) -> dict[str, int]:
    found = await rows(engine, "select resource_id, count(*) as times from outbox group by 1")
    return {row["resource_id"]: row["times"] for row in found}


async def filled(engine: AsyncEngine, entity: Any, **mapping: Any) -> dict[str, int]:
    """Backfill a class and return how often each resource was recorded."""
    manager = SyncManager(engine, [MemorySecondary("mirror")], config=quick())
    manager.track(entity, **mapping)
    await manager.register()
    assert (await manager.backfill("mirror", most_owed=None)).finished
    return await recorded(engine)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outbox.backfill._LARGEST_PAGE", 3)


@pytest.mark.parametrize("first", PARTS)
async def test_every_row_is_recorded_once_whatever_its_key(primary: AsyncEngine, first: str) -> None:
    """K6: keys of every kind, alone and leading two others."""
    chance = random.Random(first)
    expected: dict[str, int] = {}
    manager = SyncManager(primary, [MemorySecondary("mirror")], config=quick())
    for kinds in ([first], [first, *chance.sample(sorted(PARTS.keys() - WITH_ICU), 2)]):
        thing = await thing_of(primary, kinds, chance)
        async with AsyncSession(primary) as session:
            expected |= {name_of(row): 1 for row in await session.scalars(select(thing))}
        manager.track(thing, resource_type=f"Thing{len(kinds)}", resource_id=name_of, content=lambda _: {})
    await manager.register()
    assert (await manager.backfill("mirror", most_owed=None)).finished
    assert await recorded(primary) == expected
    assert len(expected) >= 20


async def table_of(engine: AsyncEngine, base: Any, *statements: str) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(base.metadata.create_all)
        for statement in statements:
            await connection.execute(text(statement))


async def test_null_parts_of_a_resource_s_name_are_what_live_events_say(primary: AsyncEngine) -> None:
    """K6: a nullable tenant and a nullable id, and the text that a null looks like."""
    base = declarative_base()
    columns = {"id": Column(Integer, primary_key=True), "tenant": Column(Text), "code": Column(Text)}
    thing = type("Thing", (base,), {"__tablename__": "thing", **columns})
    values = "(1, null, 'a'), (2, 'None', 'b'), (3, 'north', null), (4, 'north', 'd'), (5, '0', 'e')"
    await table_of(primary, base, f"insert into thing values {values}")
    entity: Any = thing
    await filled(primary, entity, tenant=entity.tenant, resource_id=entity.code, content=lambda _: {})
    found = await rows(primary, "select tenant_id, resource_id from outbox order by 1, 2")
    said = [("0", "e"), ("None", "a"), ("None", "b"), ("north", "None"), ("north", "d")]
    assert sorted(tuple(row.values()) for row in found) == sorted(said)


async def test_a_tenant_that_only_the_object_knows(primary: AsyncEngine) -> None:
    """K3: the class is read once for its tenants, and once for each of them."""
    base = declarative_base()
    thing: Any = type("Thing", (base,), {"__tablename__": "thing", "id": Column(Integer, primary_key=True)})
    await table_of(primary, base, "insert into thing select generate_series(1, 1200)")
    await filled(primary, thing, tenant=lambda row: f"t{row.id % 2}", content=lambda _: {})
    assert await value(primary, "select count(distinct (tenant_id, resource_id)) from outbox") == 1_200
    assert await value(primary, "select count(*) from outbox where tenant_id = 't1'") == 600


async def test_classes_that_inherit_and_relationships(primary: AsyncEngine) -> None:
    """K3: rows of a subclass that is tracked for itself are its own; what content asks for is loaded."""
    base = declarative_base()

    class Person(base):  # type: ignore[misc, valid-type]
        __tablename__ = "person"
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012
        id = Column(Integer, primary_key=True)
        kind = Column(Text)
        ward_id = Column(ForeignKey("ward.id"))
        ward = relationship("Ward", lazy="joined")

    class Nurse(Person):
        __tablename__ = "nurse"
        __mapper_args__ = {"polymorphic_identity": "nurse"}  # noqa: RUF012
        id = Column(ForeignKey("person.id"), primary_key=True)
        grade = Column(Text)

    class Porter(Person):
        __mapper_args__ = {"polymorphic_identity": "porter"}  # noqa: RUF012

    class Ward(base):  # type: ignore[misc, valid-type]
        __tablename__ = "ward"
        id = Column(Integer, primary_key=True)
        name = Column(Text)

    people = "(1, 'person', 1), (2, 'nurse', 1), (3, 'porter', null), (4, 'porter', 1), (5, 'nurse', null)"
    await table_of(
        primary,
        base,
        "insert into ward values (1, 'East')",
        f"insert into person values {people}",
        "insert into nurse values (2, 'A'), (5, 'B')",
    )
    manager = SyncManager(primary, [MemorySecondary("mirror")], config=quick())
    manager.track(Person, content=lambda person: {"ward": person.ward and person.ward.name})
    manager.track(Nurse, content=lambda nurse: {"grade": nurse.grade})
    await manager.register()
    assert (await manager.backfill("mirror", most_owed=None)).finished
    found = await rows(primary, "select resource_type, resource_id, content from outbox order by 1, 2")
    assert [tuple(row.values()) for row in found] == [
        ("Nurse", "2", {"grade": "A"}),
        ("Nurse", "5", {"grade": "B"}),
        ("Person", "1", {"ward": "East"}),
        ("Person", "3", {"ward": None}),
        ("Person", "4", {"ward": "East"}),
    ]


@pytest.mark.parametrize("seed", range(5))
async def test_keys_that_change_between_the_pages(primary: AsyncEngine, seed: int) -> None:
    """K6: a row that jumps over the cursor, either way, is written with an event of its own."""
    chance = random.Random(seed)
    world = World(primary)
    await world.prepare(20)

    async def jump() -> None:
        async with world.manager.session() as session, session.begin():
            patient = await session.get(Patient, ("north", chance.randrange(1, 21)))
            if patient is not None:
                patient.number = chance.choice([-1, 1]) * chance.randrange(100, 10_000)

    async with running(world.manager.relay()):
        filling = asyncio.create_task(world.manager.backfill("mirror", most_owed=2))
        while not filling.done():
            await jump()
        assert (await filling).finished
        await eventually(lambda: nothing_pending(primary))
    secondary = world.manager.registrations[0].secondary
    assert isinstance(secondary, MemorySecondary)
    assert families(secondary) == await world.held()
    assert min(number for _, number in map(of_name, families(secondary))) < 0


def of_name(key: tuple[str, str]) -> tuple[str, int]:
    tenant, name = key
    return tenant, int(name.partition("/")[2])


async def nothing_pending(engine: AsyncEngine) -> bool:
    return await pending(engine) == 0


async def test_a_row_that_no_event_can_carry_is_counted_and_holds_up_nobody(primary: AsyncEngine) -> None:
    """K3: what a session would have refused is told with its path, and without its value."""
    base = declarative_base()
    thing: Any = type(
        "Thing", (base,), {"__tablename__": "thing", "id": Column(Integer, primary_key=True), "size": Column(Float)}
    )
    await table_of(primary, base, "insert into thing values (1, 1.5), (2, 'nan'), (3, 2.5), (4, 'infinity'), (5, 0)")
    manager = SyncManager(primary, [MemorySecondary("mirror")], config=quick())
    manager.track(thing)
    await manager.register()
    done = await manager.backfill("mirror", most_owed=None)
    assert (done.recorded, done.refused, done.total, done.finished) == (3, 2, 5, True)
    assert [(each.key, each.problem.partition(":")[0]) for each in done.refusals] == [
        ("2", "content.size"),
        ("4", "content.size"),
    ]
    assert (await manager.backfill("mirror", most_owed=None)).refused == 2
