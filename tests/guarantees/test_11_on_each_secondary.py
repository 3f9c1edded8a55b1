"""Guarantee 11: seven kinds of drift, put there by another client, are found and repaired on each secondary."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import aiohttp
import pytest
from redis.asyncio import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox.secondaries.opensearch import OpenSearchSecondary
from outbox.secondaries.opensearch_documents import document_id, index_name
from outbox.secondaries.sql import SqlSecondary
from outbox.secondaries.valkey import ValkeySecondary
from tests.comparing import World, said

Key = tuple[str, str]


class Hand(Protocol):
    """Somebody with a client of the server's own. A key is a tenant and an id; all are notes."""

    async def lose(self, key: Key) -> None:
        """Take away a resource, or the tombstone of one."""

    async def put(self, key: Key, position: int, content: str) -> None:
        """Put a resource there, or another content in its place."""

    async def position(self, key: Key) -> int:
        """Return at which position it is held."""


class SqlHand:
    """Writes to the table of a SQL secondary."""

    def __init__(self, engine: AsyncEngine, table: str) -> None:
        self.engine, self.table = engine, table

    async def run(self, sql: str, key: Key, **values: Any) -> Any:
        names = dict(zip(("tenant", "name"), key, strict=True))
        if self.engine.dialect.name == "mysql":
            names = {name: value.encode() for name, value in names.items()}  # type: ignore[misc]
        async with self.engine.begin() as connection:
            return await connection.execute(text(sql), {**names, **values})

    async def lose(self, key: Key) -> None:
        await self.run(f"delete from {self.table} where tenant_id = :tenant and resource_id = :name", key)

    async def put(self, key: Key, position: int, content: str) -> None:
        await self.lose(key)
        insert = f"insert into {self.table} (tenant_id, resource_type, resource_id, position, content)"
        values = {"position": position, "content": content}
        await self.run(f"{insert} values (:tenant, 'Note', :name, :position, :content)", key, **values)

    async def position(self, key: Key) -> int:
        held = f"select position from {self.table} where tenant_id = :tenant and resource_id = :name"
        return int((await self.run(held, key)).scalar_one())


class ValkeyHand:
    """Writes the hashes and the index of a Valkey secondary."""

    def __init__(self, client: Redis, prefix: str) -> None:
        self.client, self.prefix = client, prefix

    async def lose(self, key: Key) -> None:
        await self.client.delete(f"{self.prefix}:{key[0]}:Note:{key[1]}")
        await self.client.zrem(f"{self.prefix}:{key[0]}:Note", key[1])

    async def put(self, key: Key, position: int, content: str) -> None:
        fields = {"position": position, "content": content}
        await self.client.hset(f"{self.prefix}:{key[0]}:Note:{key[1]}", mapping=fields)
        await self.client.zadd(f"{self.prefix}:{key[0]}:Note", {key[1]: 0})

    async def position(self, key: Key) -> int:
        return int(await self.client.hget(f"{self.prefix}:{key[0]}:Note:{key[1]}", "position"))


class SearchHand:
    """Writes documents to the index of a search secondary, under any `_id`."""

    def __init__(self, url: str, prefix: str) -> None:
        self.url = f"{url}/{index_name(prefix, 'Note')}/_doc/"

    async def ask(self, method: str, identity: str, body: Any = None) -> Any:
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, f"{self.url}{identity}?refresh=true", json=body) as response,
        ):
            return await response.json()

    async def lose(self, key: Key) -> None:
        await self.ask("DELETE", document_id(*key))

    async def put(self, key: Key, position: int, content: str, identity: str | None = None) -> None:
        await self.lose(key) if identity is None else None
        place = {"tenant_id": key[0], "resource_type": "Note", "resource_id": key[1]}
        body = {**place, "position": position, "deleted": False, "content": json.loads(content)}
        await self.ask("PUT", identity or document_id(*key), body)

    async def position(self, key: Key) -> int:
        return int((await self.ask("GET", document_id(*key)))["_source"]["position"])


@pytest.fixture(params=["postgresql", "mariadb", "sqlite", "valkey", "opensearch"])
async def both(
    request: pytest.FixtureRequest, primary: AsyncEngine, tmp_path: Path
) -> AsyncIterator[tuple[World, Hand]]:
    name, unique = str(request.param), f"t{uuid4().hex}"
    async for secondary, hand in _opened(request, name, primary, tmp_path, unique):
        world = await World(primary, secondary, batch_size=200).open()
        yield world, hand
        await secondary.aclose()


async def _opened(request: pytest.FixtureRequest, name: str, primary: AsyncEngine, path: Path, unique: str) -> Any:
    if name == "valkey":
        url = request.getfixturevalue("valkey_url")
        async with Redis.from_url(url, decode_responses=True) as client:
            yield ValkeySecondary("copy", url, unique), ValkeyHand(client, unique)
    elif name == "opensearch":
        url = request.getfixturevalue("opensearch_url")
        yield OpenSearchSecondary("copy", url, prefix=unique, verify_content=True), SearchHand(url, unique)
    else:
        url = primary.url if name == "postgresql" else f"sqlite+aiosqlite:///{path}/copy.db"
        url = request.getfixturevalue("mariadb_url") if name == "mariadb" else url
        engine = create_async_engine(url)
        yield SqlSecondary("copy", url, unique), SqlHand(engine, unique)
        async with engine.begin() as connection:
            await connection.execute(text(f"drop table {unique}"))
        await engine.dispose()


@pytest.mark.timeout(120)
async def test_every_kind_is_found_named_and_repaired(both: tuple[World, Hand]) -> None:
    """R5: ten of each kind among 400, put there behind our back; a second run finds none."""
    world, hand = both
    names = [f"n{number:03d}" for number in range(200)]
    for tenant in ("north", "south"):
        await world.write([*names, *(f"gone-{number}" for number in range(10))], tenant=tenant)
    await world.relay()
    old = {name: await hand.position(("north", name)) for name in names[:10]}
    await world.write(names[:10], "second")
    await world.remove([f"gone-{number}" for number in range(10)])
    await world.relay()
    equal = await world.reconcile()
    assert (equal.in_sync, equal.primary_count, equal.secondary_count) == (True, 410, 410)

    for name, position in old.items():  # stale
        await hand.put(("north", name), position, said("first"))
    for name in names[10:20]:  # altered
        await hand.put(("north", name), await hand.position(("north", name)), said("forged"))
    for name in names[20:30]:  # missing
        await hand.lose(("north", name))
    for name in names[30:40]:  # wrong tenant
        position = await hand.position(("north", name))
        await hand.lose(("north", name))
        await hand.put(("nobody", name), position, said("first"))
    for number in range(10):
        await hand.put(("south", f"extra-{number}"), 1, said("extra"))
        await hand.put(("south", f"{names[number]}-copy"), 2, said("first"))  # duplicated
        await hand.lose(("north", f"gone-{number}"))  # tombstone missing: nothing shows it, and nothing older is owed

    found = await world.reconcile(repair=True, most_deletes=0.1)
    assert (found.missing, found.extra, found.stale, found.altered) == (20, 30, 10, 10)
    assert (found.in_flight, found.refused, found.repaired) == (0, 0, 70)
    await world.relay()
    again = await world.reconcile()
    assert (again.in_sync, again.in_flight, again.secondary_count) == (True, 0, 410)


async def test_a_document_under_a_wrong_id_differs_until_a_hand_removes_it(
    primary: AsyncEngine, opensearch_url: str
) -> None:
    """R5: a repair writes under the right id only, and says so again rather than calling it equal."""
    prefix = f"t{uuid4().hex}"
    search = OpenSearchSecondary("search", opensearch_url, prefix=prefix)
    world = await World(primary, search).open()
    await world.write(["1", "2", "3"])
    await world.relay()
    hand = SearchHand(opensearch_url, prefix)
    await hand.put(("north", "2"), 2, said("first"), "somewhere-else")
    for _ in range(2):
        found = await world.reconcile(repair=True)
        # Of two documents either may be the one whose position tells stale from altered.
        assert (found.altered + found.stale, [drift.resource_id for drift in found.samples]) == (1, ["2"])
        await world.relay()
    await hand.ask("DELETE", "somewhere-else")
    assert (await world.reconcile()).in_sync
    await search.aclose()
