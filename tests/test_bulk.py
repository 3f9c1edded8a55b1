"""Bulk: one event per resource under one id; what became of it, exactly; bounded memory (O6, D8, D16 to D19)."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import (
    Applied,
    FailedResource,
    InvalidEvent,
    MemorySecondary,
    Outcome,
    Registration,
    StoredResource,
    SyncEvent,
    SyncMode,
    SyncState,
    Which,
)
from outbox.secondaries.base import Rejected, Retry
from tests.relaying import change, execute, manager_of, rows, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually


def resources(count: int, *, tenant: str = "default") -> Iterator[StoredResource]:
    for number in range(count):
        yield StoredResource(
            resource_type="Thing", resource_id=str(number), content={"value": number}, tenant_id=tenant
        )


async def test_one_that_is_refused_fails_alone_and_is_named(primary: AsyncEngine) -> None:
    """D16, SEED check 7: of ten the fourth is refused for good: nine applied, one dead, and everybody can see which."""
    secondary = ScriptedSecondary("search")
    secondary.always("3", Rejected("malformed", "no"))
    manager = manager_of(primary, secondary, ScriptedSecondary("other"))
    await manager.register()
    bulk_id, token = await manager.sync_bulk(resources(10))
    (status,) = [each for each in await manager.bulk_status(bulk_id) if each.backend_id == "search"]
    assert (status.events, status.pending, status.complete) == (10, 10, False)
    async with running(manager.relay()):
        result = await manager.wait_for_sync(token, timeout=10)
    assert (result["search"].state, result["other"].state) == (SyncState.DEAD, SyncState.APPLIED)
    other, search = await manager.bulk_status(bulk_id)
    assert (other.backend_id, other.done, other.complete, other.failed) == ("other", 10, True, ())
    assert (search.events, search.done, search.dead, search.failing, search.pending) == (10, 9, 1, 0, 0)
    assert search.failed == (FailedResource("Thing", "3", "dead", "malformed"),)
    assert (result["search"].events, result["search"].error_code) == (10, "malformed")


async def test_counts_are_a_partition_at_every_moment(primary: AsyncEngine) -> None:
    """D50: waiting, in hand, held, done: what was recorded is in one of them, and only in one."""
    secondary = ScriptedSecondary("search", pace=lambda: 0.001)
    for number in range(0, 200, 7):
        secondary.script(str(number), Retry("busy"), Retry("busy"))
    manager = manager_of(primary, secondary, batch_size=10, retry_initial=0.2, retry_max=0.2)
    await manager.register()
    bulk_id, token = await manager.sync_bulk(resources(200))
    seen = set()
    async with running(manager.relay()):
        waiting = asyncio.create_task(manager.wait_for_sync(token, timeout=20))
        while not waiting.done():
            (status,) = await manager.bulk_status(bulk_id)
            assert status.events == 200 == status.done + status.pending + status.failing + status.dead
            seen |= {name for name in ("done", "pending", "failing") if getattr(status, name)}
        assert await waiting
    assert seen == {"done", "pending", "failing"}


async def test_tombstones_are_deletes_and_versions_are_carried(primary: AsyncEngine) -> None:
    """D17, D19, SEED check 8."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary)
    await manager.register()
    await write(manager, change("1"), change("2"))
    gone = datetime(2024, 2, 29, tzinfo=UTC)
    await manager.sync_bulk(
        [
            StoredResource(resource_type="Thing", resource_id="1", content={"old": True}, deleted_at=gone, version=3),
            StoredResource(resource_type="Thing", resource_id="2", content={"new": True}, version="7"),
        ]
    )
    await manager.relay().drain()
    assert secondary.content_of("Thing", "1") is None
    assert secondary.content_of("Thing", "2") == '{"new":true}'
    assert [event.version for event in secondary.held.values()] == ["3", "7"]


async def test_a_foreign_tenant_is_refused_and_nothing_is_written(primary: AsyncEngine) -> None:
    """D18, SEED check 8: also when it comes last of many, from a generator that cannot be looked through first."""
    manager = manager_of(primary, ScriptedSecondary("search"))
    await manager.register()

    def mixed() -> Iterator[StoredResource]:
        yield from resources(2_500, tenant="acme")
        yield StoredResource(resource_type="Thing", resource_id="x", content={}, tenant_id="other")

    with pytest.raises(InvalidEvent, match=r"resources\[2500\].tenant_id"):
        await manager.sync_bulk(mixed(), tenant_id="acme")
    with pytest.raises(InvalidEvent, match=r"resources\[2500\].tenant_id"):
        SyncEvent.bulk(mixed(), tenant_id="acme")
    assert await value(primary, "select count(*) from outbox") == 0


async def test_a_bulk_has_its_place_in_the_order_of_every_key(primary: AsyncEngine) -> None:
    """O6, D14: before it, in it, after it; the last one stands, and a secondary in log order sees all three."""
    newest, every = ScriptedSecondary("newest"), ScriptedSecondary("every")
    manager = manager_of(primary, newest, Registration(every, ordering="log"))
    await manager.register()
    await write(manager, change("1", 100), change("2", 100))
    await manager.sync_bulk(resources(3))
    await write(manager, change("1", 200))
    await manager.relay().drain()
    assert newest.content_of("Thing", "1") == '{"value":200}'
    assert newest.content_of("Thing", "2") == '{"value":2}'
    assert [event.content for event in every.history if event.resource_id == "1"] == [
        '{"value":100}',
        '{"value":1}',
        '{"value":200}',
    ]


async def test_a_bulk_can_be_waited_for_like_anything_else(primary: AsyncEngine) -> None:
    """More than a batch, carried by whoever waits: his lane has nothing before it."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, batch_size=100)
    await manager.register()
    _, token = await manager.sync_bulk(resources(450))
    (status,) = await manager.sync(token, mode=SyncMode.SYNCHRONOUS, timeout=20)
    assert (status.state, status.events, status.done) == (SyncState.APPLIED, 450, 450)
    await manager.aclose()


async def test_what_is_done_of_it_is_not_the_whole(primary: AsyncEngine) -> None:
    """W1: a look at a part in which everything is done says nothing of the rest, and one that is dead is the answer."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, batch_size=900)
    await manager.register()
    bulk_id, token = await manager.sync_bulk(resources(1_000))
    assert await manager.relay().run_once("search") == 900
    (status,) = await manager.wait_for_sync(token, timeout=0)
    assert (status.state, status.synced, status.events) == (SyncState.ACCEPTED, False, 1_000)
    (status,) = await manager.wait_for_sync(token, timeout=0.5)
    assert (status.state, status.done) == (SyncState.TIMED_OUT, 900)
    secondary.always("950", Rejected("malformed"))
    await manager.relay().drain()
    (status,) = await manager.wait_for_sync(token, timeout=5)
    assert (status.state, status.error_code) == (SyncState.DEAD, "malformed")
    (bulk,) = await manager.bulk_status(bulk_id)
    assert (bulk.done, bulk.dead) == (999, 1)


async def test_a_secondary_that_was_never_owed_it_has_nothing_of_it(primary: AsyncEngine) -> None:
    """D16: one that drains, one that came later, and one that was away meanwhile say nothing, rather than complete."""
    everybody = [ScriptedSecondary(name) for name in ("away", "drains", "later", "search")]
    manager = manager_of(primary, *everybody)
    await manager_of(primary, *(each for each in everybody if each.backend_id != "later")).register()
    await manager.drain("drains")
    await manager.remove("away")
    bulk_id, _ = await manager.sync_bulk(resources(2))
    await manager.register()
    assert (await manager.backend_status("away")).status == "shadow"
    await manager.relay().drain()
    assert [(each.backend_id, each.complete) for each in await manager.bulk_status(bulk_id)] == [("search", True)]


async def test_what_was_given_up_twice_is_counted_once(primary: AsyncEngine) -> None:
    """D50: notes of a key may overlap: of what was in hand, and of what was held, the oldest is the same."""
    secondary = ScriptedSecondary("search")
    secondary.always("1", Rejected("malformed", "no"))
    manager = manager_of(primary, secondary)
    await manager.register()
    bulk_id, _ = await manager.sync_bulk(resources(3))
    await manager.relay().drain()
    await manager.discard(Which(), reason="not worth it")
    names = "backend_id, key_hash, oldest_id, tenant_id, resource_type, resource_id, events, attempts, reason"
    again = "insert into outbox_discarded ({0}, event_id) select {0}, event_id + 1 from outbox_discarded"
    await execute(primary, again.format(names))
    (status,) = await manager.bulk_status(bulk_id)
    assert (status.events, status.done, status.discarded) == (3, 2, 1)


async def test_a_hundred_thousand_resources_in_bounded_memory(primary: AsyncEngine) -> None:
    """D8: written, carried and waited for; what is held at once does not grow with the bulk."""
    count, delivered = 100_000, 0

    class Counting(MemorySecondary):
        async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
            nonlocal delivered
            delivered += len(batch)
            return [Applied()] * len(batch)

    manager = manager_of(primary, Counting("search"), batch_size=1_000, lease=30)
    await manager.register()

    async def coming() -> AsyncIterator[StoredResource]:
        for resource in resources(count):
            yield resource

    tracemalloc.start()
    _, token = await manager.sync_bulk(coming())
    _, writing = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert writing < 30 * 2**20, f"{writing / 2**20:.0f} MiB at the peak"
    assert len(token) < 1_000
    async with running(manager.relay()):
        await eventually(lambda: delivered == count)
    assert await manager.wait_for_sync(token, timeout=20)
    assert await rows(primary, "select count(*) as events, count(distinct bulk_id) as bulks from outbox") == [
        {"events": count, "bulks": 1}
    ]
    await execute(primary, "truncate outbox")
