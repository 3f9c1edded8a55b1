"""Guarantee 11: every one of seven kinds of drift is found, named and repaired, a thousand of each among 100,000."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import ReconciliationResult
from outbox.secondaries.sql import SqlSecondary
from tests.comparing import World
from tests.relaying import dsn_of, execute, pending, value

# Positions start high, so that there is room below for those of long ago. The tenants are `a` and `b`.
FILL = (
    """
    insert into note (tenant_id, number, content)
    select case when n % 2 = 0 then 'a' else 'b' end, n::text, '{"word": "first", "n": ' || n || '}'
    from generate_series(1, :size) as n
    """,
    """
    insert into outbox (event_id, tenant_id, resource_type, resource_id, operation, content) overriding system value
    select :size + cast(number as bigint), tenant_id, 'Note', number, 'create', cast(content as json) from note
    """,
    "select setval('outbox_event_id_seq', 3 * :size)",
    """
    insert into outbox_resources (tenant_id, resource_type, resource_id, position, content)
    select tenant_id, 'Note', number, :size + cast(number as bigint), content from note
    """,
    # What was deleted on both sides, of which the secondary keeps a tombstone.
    """
    insert into outbox_resources (tenant_id, resource_type, resource_id, position)
    select 'a', 'Note', 'gone-' || n, :size + n from generate_series(1, :size / 100) as n
    """,
    "analyze note",
    "analyze outbox_resources",
)
CHOSEN = "case when resource_id ~ '^[0-9]+$' and content is not null then cast(resource_id as int) % 100 end"
DAMAGE = {
    "missing": f"delete from outbox_resources where {CHOSEN} = 1",
    "extra": """
        insert into outbox_resources (tenant_id, resource_type, resource_id, position, content)
        select case when n % 2 = 0 then 'a' else 'b' end, 'Note', 'extra-' || n, 1, '{}'
        from generate_series(1, :size / 100) as n
    """,
    "stale": f"""
        update outbox_resources set position = position - :size, content = '{{"word": "older"}}' where {CHOSEN} = 3
    """,
    "altered": f"update outbox_resources set content = replace(content, 'first', 'forged') where {CHOSEN} = 4",
    "wrong tenant": f"""
        update outbox_resources set tenant_id = case tenant_id when 'a' then 'b' else 'a' end where {CHOSEN} = 5
    """,
    "misplaced": f"""
        insert into outbox_resources (tenant_id, resource_type, resource_id, position, content)
        select tenant_id, resource_type, resource_id || '-copy', position, content
        from outbox_resources where {CHOSEN} = 6
    """,
    "no tombstone": "delete from outbox_resources where resource_id like 'gone-%'",
}
# What of each kind reconcile shows: a resource in the wrong place is missed in one and too much in the other.
SHOWN = {
    "missing": (1, 0, 0, 0),
    "extra": (0, 1, 0, 0),
    "stale": (0, 0, 1, 0),
    "altered": (0, 0, 0, 1),
    "wrong tenant": (1, 1, 0, 0),
    "misplaced": (0, 1, 0, 0),
    "no tombstone": (0, 0, 0, 0),
}
DIFFERENT = """
select count(*)
from note full join (select * from outbox_resources where content is not null) as held
  on held.tenant_id = note.tenant_id and held.resource_id = note.number
where held.content is distinct from note.content
"""


@pytest.fixture
async def copy(primary: AsyncEngine) -> AsyncIterator[SqlSecondary]:
    copy = SqlSecondary("copy", dsn_of(primary))
    await copy.check()
    _ = [seen async for seen in copy.scan("nobody", "Note")]
    yield copy
    await copy.aclose()


async def filled(engine: AsyncEngine, copy: SqlSecondary, size: int, **how: Any) -> World:
    world = await World(engine, copy, **{"batch_size": 500, **how}).open()
    for statement in FILL:
        await execute(engine, statement, **({"size": size} if ":size" in statement else {}))
    return world


async def damage(engine: AsyncEngine, size: int, *kinds: str) -> None:
    for kind in kinds:
        await execute(engine, DAMAGE[kind], **({"size": size} if ":size" in DAMAGE[kind] else {}))


def counted(found: ReconciliationResult) -> tuple[int, int, int, int]:
    return (found.missing, found.extra, found.stale, found.altered)


@pytest.mark.timeout(180)
async def test_a_thousand_of_each_kind_among_a_hundred_thousand(primary: AsyncEngine, copy: SqlSecondary) -> None:
    """R5: all are found with the right kind, repaired by a relay, and a second run finds none."""
    size = 100_000
    world = await filled(primary, copy, size)
    assert await world.source.can_sum("Note")
    equal = await world.reconcile()
    assert (equal.in_sync, equal.listed, equal.primary_count, equal.secondary_count) == (True, 0, size, size)

    await damage(primary, size, *DAMAGE)
    found = await world.reconcile(repair=True)
    assert counted(found) == tuple(sum(shown) * size // 100 for shown in zip(*SHOWN.values(), strict=True))
    assert (found.in_flight, found.refused, found.repaired) == (0, 0, sum(counted(found)))
    assert (found.primary_count, found.secondary_count) == (size, size + 1_000)
    await world.relay()

    again = await world.reconcile()
    assert (counted(again), again.in_flight, again.listed) == ((0, 0, 0, 0), 0, 0)
    assert (again.primary_count, again.secondary_count) == (size, size)
    assert await value(primary, DIFFERENT) == 0


@pytest.mark.parametrize("summed", [True, False], ids=["by ranges", "by pages"])
async def test_each_kind_alone_is_called_by_its_name(primary: AsyncEngine, copy: SqlSecondary, summed: bool) -> None:
    """R5: exactly these resources, and no others, whether the primary can sum its ranges or not."""
    size = 2_000
    world = await filled(primary, copy, size, summed=summed)
    assert await world.source.can_sum("Note") is summed
    for kind in DAMAGE:
        await damage(primary, size, kind)
        found = await world.reconcile(repair=True)
        assert (kind, counted(found)) == (kind, tuple(each * size // 100 for each in SHOWN[kind]))
        assert found.in_flight == 0
        for name in (drift.resource_id for drift in found.samples):
            assert name.startswith("extra-") or name.endswith("-copy") or int(name) % 100 in (1, 3, 4, 5)
        await world.relay()
        assert (await world.reconcile()).in_sync
        assert await value(primary, DIFFERENT) == 0


async def test_a_single_altered_resource_is_found_without_reading_the_others(
    primary: AsyncEngine, copy: SqlSecondary
) -> None:
    """R5: ranges whose sums are equal are not listed, so no more than a few hundred contents are read."""
    world = await filled(primary, copy, 30_000)
    await execute(primary, "update outbox_resources set content = '{}' where resource_id = '12345'")
    found = await world.reconcile()
    assert [drift.resource_id for drift in found.samples] == ["12345"]
    assert 0 < found.listed <= 700


async def test_a_missing_tombstone_is_not_seen_and_does_no_harm(primary: AsyncEngine, copy: SqlSecondary) -> None:
    """R5: nothing older is owed any more; were it applied all the same, the next run would find it."""
    world = await filled(primary, copy, 1_000)
    await damage(primary, 1_000, "no tombstone")
    assert (await world.reconcile()).in_sync
    assert await pending(primary, "copy") == 0
    await execute(
        primary,
        "insert into outbox_resources (tenant_id, resource_type, resource_id, position, content)"
        " values ('a', 'Note', 'gone-3', 3, '{}')",
    )
    found = await world.reconcile(repair=True)
    assert (counted(found), found.repaired) == ((0, 1, 0, 0), 1)
    await world.relay()
    assert await copy.content_of("Note", "gone-3", tenant_id="a") is None
