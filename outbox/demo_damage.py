"""The demo's damage: what a careless colleague does to a cache and a database, with their own clients."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from redis.asyncio import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from outbox.demo_data import Key, Life, revised

__all__ = ["Plan", "damage_cache", "damage_reporting", "draw_damage"]

_LOST = _ALTERED = 3
_SET_BACK = _SMUGGLED = 2

# What the primary first said about a resource, as an old backup would still have it.
_FIRST = text("""
select event_id, cast(content as text) from outbox
where tenant_id = :tenant_id and resource_type = :resource_type and resource_id = :resource_id
order by event_id limit 1
""")
_HELD = text("""
select position, content from outbox_resources
where tenant_id = :tenant_id and resource_type = :resource_type and resource_id = :resource_id
""")
_OVERWRITE = text("""
update outbox_resources set position = :position, content = :content
where tenant_id = :tenant_id and resource_type = :resource_type and resource_id = :resource_id
""")
_LOSE = text("""
delete from outbox_resources
where tenant_id = :tenant_id and resource_type = :resource_type and resource_id = :resource_id
""")
_SMUGGLE = text("""
insert into outbox_resources (tenant_id, resource_type, resource_id, position, content)
values (:tenant_id, :resource_type, :resource_id, :position, :content)
""")


class _Old(NamedTuple):
    key: Key
    position: int
    content: str


class Plan(NamedTuple):
    """What to do to one secondary, no resource twice."""

    lost: list[Key]
    altered: list[Key]
    set_back: list[_Old]
    smuggled: list[Key]

    def drift(self) -> tuple[int, int, int, int]:
        """Return what reconcile must find of it: missing, extra, stale, altered."""
        return len(self.lost), len(self.smuggled), len(self.set_back), len(self.altered)


async def draw_damage(primary: AsyncEngine, life: Life, seed: int) -> tuple[Plan, Plan]:
    """Draw two plans that have no resource in common."""
    chance = random.Random(seed)
    old = life.some_revised(2 * _SET_BACK)
    alive = chance.sample([key for key in life.alive if key not in old], 2 * (_LOST + _ALTERED + _SMUGGLED))
    before = await _first_versions(primary, old)
    drawn = iter(alive)
    plans = [
        Plan(
            lost=list(islice(drawn, _LOST)),
            altered=list(islice(drawn, _ALTERED)),
            set_back=before[number::2],
            smuggled=[(tenant, kind, f"nobody-{kept}") for tenant, kind, kept in islice(drawn, _SMUGGLED)],
        )
        for number in range(2)
    ]
    return plans[0], plans[1]


async def damage_cache(url: str, plan: Plan) -> None:
    """Do it in the cache, with a client that knows nothing of us."""
    async with Redis.from_url(url, decode_responses=True) as client:
        for key in plan.lost:
            await client.delete(_name(key))
            await client.zrem(_name(key[:2]), key[2])
        for key in plan.altered:
            content = await client.hget(_name(key), "content")
            await client.hset(_name(key), "content", _altered(str(content)))
        for old in plan.set_back:
            await client.hset(_name(old.key), mapping={"position": old.position, "content": old.content})
        for key in plan.smuggled:
            await client.hset(_name(key), mapping={"position": 1, "content": _smuggled(key)})
            await client.zadd(_name(key[:2]), {key[2]: 0})


async def damage_reporting(dsn: str, plan: Plan) -> None:
    """Do it in the second database, with SQL of our own."""
    engine = create_async_engine(dsn)
    try:
        async with engine.begin() as connection:
            await _damage_rows(connection, plan)
    finally:
        await engine.dispose()


async def _damage_rows(connection: AsyncConnection, plan: Plan) -> None:
    for key in plan.lost:
        await connection.execute(_LOSE, _where(key))
    for key in plan.altered:
        position, content = (await connection.execute(_HELD, _where(key))).one()
        await connection.execute(_OVERWRITE, {**_where(key), "position": position, "content": _altered(content)})
    for old in plan.set_back:
        values = {"position": old.position, "content": old.content}
        await connection.execute(_OVERWRITE, {**_where(old.key), **values})
    for key in plan.smuggled:
        await connection.execute(_SMUGGLE, {**_where(key), "position": 1, "content": _smuggled(key)})


async def _first_versions(primary: AsyncEngine, keys: Sequence[Key]) -> list[_Old]:
    async with primary.connect() as connection:
        found = [(key, (await connection.execute(_FIRST, _where(key))).one()) for key in keys]
    return [_Old(key, position, content) for key, (position, content) in found]


def _where(key: Key) -> dict[str, str]:
    return dict(zip(("tenant_id", "resource_type", "resource_id"), key, strict=True))


def _name(key: Sequence[str]) -> str:
    """The key of a resource, or of the index of a tenant and type, as the adapter documents them."""
    return ":".join(("outbox", *(part.replace("%", "%25").replace(":", "%3A") for part in key)))


def _altered(content: str) -> str:
    return json.dumps({**json.loads(content), "language": "tampered"})


def _smuggled(key: Key) -> str:
    return revised(json.dumps({"resourceType": key[1], "id": key[2]}), 1)
