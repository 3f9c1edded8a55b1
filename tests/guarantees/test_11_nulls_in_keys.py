"""Guarantee 11: a null in a key, and a column that is no text, name resources as live events and backfills do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from enum import Enum, StrEnum
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from msgspec.structs import replace
from sqlalchemy import BigInteger, Boolean, Column, Integer, String, Text, TypeDecorator, Uuid, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import declarative_base

from outbox import MemorySecondary, NotForgotten, SyncEvent, SyncManager
from outbox.listing import sorts_by_bytes
from outbox.paging import extents
from outbox.source import Source
from tests.comparing import said
from tests.guarantees.test_11_listing_order import OTHER, Plain
from tests.relaying import execute, manager_of, raw

Key = tuple[str, str]


class Region(Enum):
    NORTH = 1
    SOUTH = 2


class Ward(StrEnum):
    EAST = "east"
    WEST = "west"


class Shouted(TypeDecorator[str]):
    """Shows `x` as `X`, and takes nothing but that back."""

    impl = String(40)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        assert value is None or value.isupper()
        return value and value.lower()

    def process_result_value(self, value: str | None, dialect: Any) -> str | None:
        return value and value.upper()


def thing_of(tenant: Any = Text, name: Any = None) -> Any:
    """Return a class whose tenant and name may be null."""
    columns = {
        "number": Column(Integer, primary_key=True),
        "tenant": Column(tenant),
        "name": Column(name or Text(collation="C")),
        "content": Column(Text, nullable=False),
    }
    return type("Thing", (declarative_base(),), {"__tablename__": "thing", **columns})


async def managed(
    engine: AsyncEngine, secondary: Any, thing: Any, keys: list[tuple[Any, Any]], how: str
) -> SyncManager:
    """A table of things with these keys, of which no session has seen one, and a manager that tracks them."""
    async with engine.begin() as connection:
        await connection.run_sync(thing.metadata.create_all)
        if how == "by language":
            collation = await connection.scalar(text(OTHER))
            await connection.execute(text(f'alter table thing alter column name type text collate "{collation}"'))
        rows = [{"tenant": tenant, "name": name, "content": said("first")} for tenant, name in keys]
        await connection.execute(sa.insert(thing.__table__), rows)
    manager = manager_of(engine, secondary)
    content: Any = (lambda row: row.content) if how == "by function" else thing.content
    manager.track(thing, tenant=thing.tenant, resource_id=thing.name, content=content)
    return manager


def held(secondary: MemorySecondary) -> set[Key]:
    return {(each.tenant_id, each.resource_id) for each in secondary.held.values() if each.content is not None}


NULLS = [(None, "a"), ("None", "b"), (None, "Zed"), ("north", None), ("north", "Zed"), ("north", "A"), (None, None)]


@pytest.mark.parametrize("how", ["by sums", "merged", "by function", "by language"])
async def test_a_null_is_compared_restored_and_removed_as_any_other_key(
    primary: AsyncEngine, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is 'None' to events and backfills; taken for absent, it was deleted, and then called equal."""
    monkeypatch.setattr("outbox.source._PAGE", 2)
    plain = Plain()
    secondary = plain.inner
    manager = await managed(primary, plain if how == "merged" else secondary, thing_of(), NULLS, how)
    added = await manager.add("mirror")
    expected = {(str(tenant), str(name)) for tenant, name in NULLS}
    assert (added.equal, added.proof.primary_count, held(secondary)) == (True, len(NULLS), expected)

    for key in [each for each in secondary.held if "None" in each]:
        del secondary.held[key]
    found = await manager.reconcile("mirror", repair=True)
    lost = len([key for key in NULLS if None in key or "None" in key])
    assert (found.missing, found.extra, found.repaired) == (lost, 0, lost)
    await manager.relay().drain()
    assert ((await manager.reconcile("mirror")).in_sync, held(secondary)) == (True, expected)

    await execute(primary, "delete from thing where tenant is null")
    found = await manager.reconcile("mirror", repair=True)
    assert (found.missing, found.extra, found.repaired) == (0, 3, 3)
    await manager.relay().drain()
    assert (await manager.reconcile("mirror")).in_sync
    assert held(secondary) == {key for key in expected if key == ("None", "b") or key[0] == "north"}


async def test_what_has_a_null_for_a_tenant_is_not_forgotten_while_it_is_there(primary: AsyncEngine) -> None:
    """A row that `forget` takes for absent would be erased everywhere but where it is."""
    manager = await managed(primary, MemorySecondary("mirror"), thing_of(), NULLS, "by sums")
    await manager.register()
    for tenant, name in (("None", "a"), ("None", "None"), ("north", "None")):
        with pytest.raises(NotForgotten):
            await manager.forget("Thing", name, tenant)


KINDS: dict[str, tuple[Any, list[Any]]] = {
    "integer": (Integer, [1, -7, None]),
    "big integer": (BigInteger, [2**40, 1, None]),
    "uuid": (Uuid, [UUID(int=1), UUID(int=2), None]),
    "uuid as text": (Uuid(as_uuid=False), [str(UUID(int=1)), str(UUID(int=2)), None]),
    "enumeration": (sa.Enum(Region), [*Region, None]),
    "enumeration of texts": (sa.Enum(Ward), [*Ward, None]),
    "enumeration of words": (sa.Enum("red", "green", name="colour"), ["red", "green", None]),
    "decorated": (Shouted, ["A", "B", None]),
    "boolean": (Boolean, [True, False, None]),
}


@pytest.mark.parametrize("part", ["tenant", "name"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_key_of_any_kind_is_found_by_its_text(primary: AsyncEngine, kind: str, part: str) -> None:
    """What capture and backfill name by `str` is found by that, and a text that no value has is found nowhere."""
    type_, values = KINDS[kind]
    keys = [(value, "a") if part == "tenant" else ("north", value) for value in values]
    secondary = MemorySecondary("mirror")
    manager = await managed(primary, secondary, thing_of(**{part: type_}), keys, "by sums")
    assert (await manager.add("mirror")).equal
    expected = {(str(tenant), str(name)) for tenant, name in keys}
    assert held(secondary) == expected

    lost = next(key for key in secondary.held if "None" not in key)
    stranger = SyncEvent.create("Thing", "nobody", said("first"), tenant_id=lost[0])
    if part == "tenant":
        stranger = replace(stranger, tenant_id="nobody")
    secondary.held[stranger.key] = replace(stranger, position=1)
    del secondary.held[lost]
    found = await manager.reconcile("mirror", repair=True)
    assert (found.missing, found.extra, found.repaired) == (1, 1, 2)
    await manager.relay().drain()
    assert ((await manager.reconcile("mirror")).in_sync, held(secondary)) == (True, expected)


async def test_only_a_column_that_takes_no_null_is_walked_along_its_index(primary: AsyncEngine) -> None:
    """A null sorts behind everything, and its name does not; a promise that was not validated is none."""
    thing = thing_of()
    await managed(primary, MemorySecondary("mirror"), thing, NULLS, "by sums")
    assert not await sorts_by_bytes(primary, thing.name)
    if int(await _setting(primary, "server_version_num")) >= 180000:
        await execute(primary, "alter table thing add constraint named not null name not valid")
        assert not await sorts_by_bytes(primary, thing.name)
    await execute(primary, "delete from thing where name is null")
    await execute(primary, "alter table thing alter column name set not null")
    assert await sorts_by_bytes(primary, thing.name)


async def _setting(engine: AsyncEngine, name: str) -> str:
    async with engine.connect() as connection:
        return str(await connection.scalar(sa.select(sa.func.current_setting(name))))


@pytest.fixture
async def sent(primary: AsyncEngine) -> AsyncIterator[list[tuple[str, Any]]]:
    """Every statement about things that the engine sends from here on, with its parameters."""
    heard: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "FROM thing" in statement:
            heard.append((statement, parameters))

    event.listen(primary.sync_engine, "before_cursor_execute", note)
    yield heard
    event.remove(primary.sync_engine, "before_cursor_execute", note)


LOOKS: dict[str, Callable[[Source, AsyncSession, str], Any]] = {
    "find": lambda source, _, tenant: source.find(tenant, "Thing", ["7", "107"]),
    "locked": lambda source, session, tenant: source.locked(session, tenant, "Thing", ["7", "107"]),
    "list": lambda source, _, tenant: anext(source.pages(tenant, "Thing", "2")),
    "sum": lambda source, _, tenant: source.summarise(tenant, "Thing", "2", "3"),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("tenant", ["t7", "None"])
async def test_a_tenant_s_resources_are_found_along_an_index(
    primary: AsyncEngine, sent: list[tuple[str, Any]], look: str, tenant: str
) -> None:
    """To look for nulls as well takes the index twice."""
    manager = await _many(primary, "(tenant, name)")
    await execute(primary, "alter table thing alter column name set not null")
    sent.clear()
    async with AsyncSession(primary) as session:
        assert await LOOKS[look](Source(primary, manager.tracking), session, tenant)
    await _reads_along(primary, sent)


async def test_a_backfill_pages_along_an_index(primary: AsyncEngine, sent: list[tuple[str, Any]]) -> None:
    """An index that begins with the tenant's column keeps a page from reading others' rows."""
    manager = await _many(primary, "(tenant, number)")
    extent = next(each for each in await extents(primary, manager.tracking, None) if each.tenant_id == "t7")
    sent.clear()
    async with AsyncSession(primary) as session:
        assert len(await session.run_sync(extent.keys, ("5000",), 10)) == 10
    await _reads_along(primary, sent)


async def _many(engine: AsyncEngine, index: str) -> SyncManager:
    """Ten thousand things of a hundred tenants, one of whom is null, and an index."""
    keys = [(f"t{number % 100}" if number % 100 else None, str(number)) for number in range(10_000)]
    manager = await managed(engine, MemorySecondary("mirror"), thing_of(), [*keys, (None, "7")], "by sums")
    await execute(engine, f"create index of_tenant on thing {index}")
    await execute(engine, "analyze thing")
    return manager


async def _reads_along(engine: AsyncEngine, sent: list[tuple[str, Any]]) -> None:
    assert sent
    async with raw(engine) as connection:
        for statement, parameters in sent:
            explained = await connection.fetch(f"explain {statement}", *parameters)
            plan = "\n".join(row[0] for row in explained)
            # Otherwise the index is read from end to end.
            assert plan.count("Index Cond: ((tenant = ") + plan.count("Index Cond: (tenant ") > 0, plan
            assert "Seq Scan" not in plan
