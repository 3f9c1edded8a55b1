"""Guarantee 11: however the primary sorts, both sides are walked in one order: nothing is skipped or met twice."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest
from msgspec.structs import replace
from sqlalchemy import BigInteger, Integer, Text, Uuid, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox import MemorySecondary, SyncManager
from outbox.capture import identity_of
from outbox.listing import sorts_by_bytes
from outbox.source import Source
from tests.relaying import execute, manager_of, rows

WORDS = ["a", "A", "ä", "Ä", "a\u0308", "z", "Z", "ß", "ss", "é", "e\u0301", "0", "9", "10", "\u0663", "-", "_", "~"]
WORDS += ["a b", "a-b", "ab", "aB", "Ab", "a/b", "a%2Fb", "😀", "😀a", "\ufb01", "\uffff", "\U00010000", "\u0131", "I"]
WORDS += ["i", "İ", "ñ", "n~", "'", '"']
HUGE = [word + suffix for word in WORDS for suffix in ("", "x", "X", "é", "😀")]
NUMBERS = [0, 1, -1, 9, 10, 11, 99, 100, -10, 2**31 - 1, -(2**31)]
UUIDS = [UUID(int=number * 0x0123_4567_89AB_CDEF_1357 % 2**128) for number in range(40)]


class Base(DeclarativeBase): ...


class ByLanguage(Base):
    __tablename__ = "by_language"
    name: Mapped[str] = mapped_column(Text, primary_key=True)
    word: Mapped[str] = mapped_column(Text)


class ByBytes(Base):
    __tablename__ = "by_bytes"
    name: Mapped[str] = mapped_column(Text(collation="C"), primary_key=True)
    word: Mapped[str] = mapped_column(Text)


class ByNumber(Base):
    __tablename__ = "by_number"
    name: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    word: Mapped[str] = mapped_column(Text)


class ByUuid(Base):
    __tablename__ = "by_uuid"
    name: Mapped[UUID] = mapped_column(Uuid, primary_key=True)
    word: Mapped[str] = mapped_column(Text)


class ByParts(Base):
    __tablename__ = "by_parts"
    name: Mapped[str] = mapped_column(Text, primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    word: Mapped[str] = mapped_column(Text)


class ByFunction(Base):
    __tablename__ = "by_function"
    name: Mapped[str] = mapped_column(Text, primary_key=True)
    word: Mapped[str] = mapped_column(Text)


# Each with its objects, and how its id is told.
KINDS: dict[str, tuple[type[Any], list[Any], dict[str, Any]]] = {
    "language": (ByLanguage, [ByLanguage(name=each, word="first") for each in HUGE], {"resource_id": ByLanguage.name}),
    "bytes": (ByBytes, [ByBytes(name=each, word="first") for each in HUGE], {}),
    "numbers": (ByNumber, [ByNumber(name=each, word="first") for each in NUMBERS], {}),
    "uuids": (ByUuid, [ByUuid(name=each, word="first") for each in UUIDS], {"resource_id": ByUuid.name}),
    "parts": (ByParts, [ByParts(name=each, number=n, word="first") for each in WORDS for n in (1, 2**40)], {}),
    "function": (
        ByFunction,
        [ByFunction(name=each, word="first") for each in HUGE],
        {"resource_id": lambda row: f"urn:{row.name}"},
    ),
}


Filled = tuple[SyncManager, MemorySecondary]
OTHER = """
select collname from pg_collation
where collname in ('und-x-icu', 'en_US.utf8', 'C.utf8', 'C.UTF-8') and collencoding in (-1, 6)
order by collprovider = 'i' desc, collname = 'en_US.utf8' desc limit 1
"""


class Plain:
    """A secondary that can be applied to and scanned, and no more."""

    def __init__(self) -> None:
        self.inner = MemorySecondary("mirror")
        self.backend_id, self.apply, self.scan = "mirror", self.inner.apply, self.inner.scan


async def create(engine: AsyncEngine) -> None:
    """Create the tables; by language is what the server has of that, and any but the bytes' own will do."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        collation = await connection.scalar(text(OTHER))
        for table in ("by_language", "by_function"):
            await connection.execute(text(f'alter table {table} alter column name type text collate "{collation}"'))


async def fill(primary: AsyncEngine, kind: str, *, merged: bool) -> Filled:
    entity, objects, how = KINDS[kind]
    plain = Plain()
    manager = manager_of(primary, plain if merged else plain.inner, batch_size=500)
    content = (lambda row: json.dumps({"word": row.word})) if kind != "bytes" else None
    manager.track(entity, resource_type="Thing", **({"content": content} if content else {}), **how)
    await create(primary)
    await manager.register()
    async with manager.session() as session, session.begin():
        for each in objects:
            await session.merge(each)
    await manager.relay().drain()
    return manager, plain.inner


@pytest.mark.parametrize("kind", KINDS)
async def test_every_resource_is_met_once_in_the_order_of_its_bytes(
    primary: AsyncEngine, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R7: whatever the page: mixed case, accents, digits, emoji; `find` and `locked` find each by its id."""
    manager, secondary = await fill(primary, kind, merged=True)
    monkeypatch.setattr("outbox.source._PAGE", 7)
    source = Source(primary, manager.tracking)
    names = [row.resource_id async for page in source.pages("default", "Thing") for row in page]
    assert names == sorted({key[2] for key in secondary.held}, key=str.encode)
    assert len(names) == len(KINDS[kind][1])
    middle = [row.resource_id async for page in source.pages("default", "Thing", names[3], names[8]) for row in page]
    assert middle == names[4:9]
    asked = [*names, "absent", "1.0", "01", "urn:", "a/b/c", "", " ", str(UUIDS[1]).upper(), "9" * 30]
    assert sorted(await source.find("default", "Thing", asked)) == sorted(names)
    async with AsyncSession(primary) as session, session.begin():
        assert sorted(await source.locked(session, "default", "Thing", asked)) == sorted(names)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "by sums"])
@pytest.mark.parametrize("kind", KINDS)
async def test_drift_is_found_at_every_place_of_the_order(
    primary: AsyncEngine, kind: str, merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R7: each third resource is missing, each third altered, and the rest is equal; then either side ends first."""
    manager, secondary = await fill(primary, kind, merged=merged)
    monkeypatch.setattr("outbox.source._PAGE", 7)
    assert (await manager.reconcile("mirror")).in_flight == 0
    names = sorted(secondary.held, key=lambda key: key[2].encode())
    for key in names[::3]:
        del secondary.held[key]
    for key in names[1::3]:
        secondary.held[key] = _altered(secondary.held[key])
    found = await manager.reconcile("mirror", repair=True)
    assert (found.missing, found.altered) == (len(names[::3]), len(names[1::3]))
    assert (found.extra, found.stale, found.in_flight) == (0, 0, 0)
    assert (found.primary_count, found.secondary_count) == (len(names), len(names) - len(names[::3]))
    await manager.relay().drain()
    assert (await manager.reconcile("mirror")).in_sync

    whole = dict(secondary.held)
    last = max(whole, key=lambda key: key[2].encode())
    for left in ({}, {last: whole[last]}):
        secondary.held = dict(left)
        found = await manager.reconcile("mirror")
        assert (found.missing, found.primary_count) == (len(whole) - len(left), len(whole))


def _altered(held: Any) -> Any:
    return replace(held, content='{"word":"forged"}')


@pytest.fixture
async def statements(primary: AsyncEngine) -> AsyncIterator[list[str]]:
    """Every SELECT that the engine sends from here on."""
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    event.listen(primary.sync_engine, "before_cursor_execute", note)
    yield sent
    event.remove(primary.sync_engine, "before_cursor_execute", note)


async def test_a_column_that_sorts_by_bytes_is_walked_along_its_index(primary: AsyncEngine) -> None:
    """R7: no page sorts anything, however many there are; another collation sorts once, in one statement."""
    manager = manager_of(primary, MemorySecondary("mirror"))
    manager.track(ByBytes)
    manager.track(ByLanguage)
    await create(primary)
    assert [await sorts_by_bytes(primary, column) for column in (ByBytes.name, ByLanguage.name)] == [True, False]
    await execute(primary, "insert into by_bytes select n::text, '' from generate_series(1, 20000) as n")
    await execute(primary, "analyze by_bytes")
    for condition in ("name > '5'", "name > '5' and name <= '7'"):
        explained = await rows(primary, f"explain select * from by_bytes where {condition} order by name limit 500")
        plan = "\n".join(next(iter(row.values())) for row in explained)
        assert "by_bytes_pkey" in plan
        assert "Sort" not in plan


@pytest.mark.parametrize(("entity", "most"), [(ByBytes, 12), (ByLanguage, 33)])
async def test_the_number_of_statements_grows_with_the_pages_and_not_with_the_rows(
    primary: AsyncEngine, statements: list[str], entity: type[Any], most: int
) -> None:
    """R7, R8: one statement per page along an index; two, and a commit between, for any other order."""
    manager = manager_of(primary, MemorySecondary("mirror"))
    manager.track(entity, resource_type="Thing")
    await create(primary)
    await execute(primary, f"insert into {entity.__tablename__} select n::text, '' from generate_series(1, 5000) as n")
    statements.clear()
    source = Source(primary, manager.tracking)
    names = [row.resource_id async for page in source.pages("default", "Thing") for row in page]
    assert names == sorted(map(str, range(1, 5001)))
    assert 10 <= len(statements) <= most


def test_a_composite_key_is_told_apart_from_its_parts() -> None:
    """R7: a slash inside a part is escaped, so no two keys share an id."""
    keys = [("a/b", 1), ("a", 1), ("a%2Fb", 1), ("é", 2)]
    found = {identity_of(ByParts(name=name, number=number, word="")) for name, number in keys}
    assert len(found) == len(keys)
