"""Guarantee 11: an empty, cut off or wrong listing of either side never leads to many deletes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.errors import Unavailable
from outbox.listing import PrimaryRow
from outbox.secondaries.base import ResourceDigest, Summary
from outbox.source import Source
from tests.comparing import Interrupted, World, said
from tests.relaying import execute, value

DELETES = "select count(*) from outbox where operation = 'delete'"


class Forgetful(Interrupted):
    """Shows only the first `most` of its resources, to whoever asks; raises after them if it is `honest`."""

    most: int | None = None
    honest = False
    finds = True

    async def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> AsyncIterator[ResourceDigest]:
        number = 0
        async for seen in super().scan(tenant_id, resource_type, after):
            if number == self.most:
                if self.honest:
                    raise Unavailable("expired", "the listing was cut off")
                return
            number += 1
            yield seen

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> Sequence[ResourceDigest]:
        found = await super().find(tenant_id, resource_type, resource_ids)
        return found if self.finds or self.most is None else found[: self.most]

    async def summarise(self, tenant_id: str, resource_type: str, after: str | None, through: str | None) -> Summary:
        if self.most is None:
            return await super().summarise(tenant_id, resource_type, after, through)
        return Summary(self.most, 0)


class Short(Source):
    """Lists the first page only, of two."""

    async def pages(
        self, tenant_id: str, resource_type: str, after: str | None = None, through: str | None = None
    ) -> AsyncIterator[list[PrimaryRow]]:
        async for page in super().pages(tenant_id, resource_type, after, through):
            yield page[:2]
            return


async def opened(engine: AsyncEngine, *, number: int = 40, tenants: Sequence[str] = ("north",)) -> World:
    world = await World(engine, Forgetful("mirror")).open()
    for tenant in tenants:
        await world.write([f"{each:03d}" for each in range(number)], tenant=tenant)
    await world.relay()
    return world


async def test_an_empty_primary_empties_nothing_however_small_the_tenants(primary: AsyncEngine) -> None:
    """R10: five resources of each of thirty tenants are few, all of them together are not."""
    world = await opened(primary, number=5, tenants=[f"t{number}" for number in range(30)])
    await execute(primary, "delete from note")
    found = await world.reconcile(repair=True)
    assert (found.extra, found.refused, found.repaired) == (150, 150, 0)
    assert await value(primary, DELETES) == 0


async def test_a_primary_that_lists_too_little_is_looked_at_again(primary: AsyncEngine) -> None:
    """R10: what a cut off listing leaves out is asked for by id, and is there."""
    world = await opened(primary)
    world.source = Short(primary, world.manager.tracking)
    await execute(primary, "update note set content = '{}' where number = '000'")
    found = await world.reconcile(repair=True)
    assert (found.altered, found.extra, found.missing) == (1, 0, 0)
    assert await value(primary, DELETES) == 0


@pytest.mark.parametrize("most", [0, 7])
@pytest.mark.parametrize("finds", [True, False])
async def test_a_secondary_that_shows_too_little_is_sent_what_it_has_at_most(
    primary: AsyncEngine, most: int, finds: bool
) -> None:
    """R10: a short listing looks like missing resources; sent again they change nothing, and nothing is deleted."""
    world = await opened(primary)
    world.secondary.most, world.secondary.finds = most, finds
    found = await world.reconcile(repair=True)
    assert (found.missing > 0, found.extra) == (not finds, 0)
    world.secondary.most = None
    await world.relay()
    assert await value(primary, DELETES) == 0
    assert (await world.reconcile()).in_sync


async def test_a_listing_that_says_it_was_cut_off_ends_the_comparison(primary: AsyncEngine) -> None:
    """R10: nothing is recorded of what was not read to its end, and no result calls it compared."""
    world = await opened(primary)
    world.secondary.most, world.secondary.honest = 30, True
    await execute(primary, "delete from note where number < '005'")
    with pytest.raises(Unavailable):
        await world.reconcile(repair=True)
    assert await value(primary, DELETES) == 0
    assert await value(primary, "select count(*) from outbox_reconciliation") == 0


@pytest.mark.parametrize(("extras", "removed"), [(10, 10), (11, 0)])
async def test_ten_are_always_few(primary: AsyncEngine, extras: int, removed: int) -> None:
    """R10: one more than the share allows, or than ten, and all are left alone and counted."""
    world = await opened(primary)
    await execute(primary, "delete from note where cast(number as int) < :extras", extras=extras)
    found = await world.reconcile(repair=True)
    assert (found.extra, found.repaired, found.refused) == (extras, removed, extras - removed)
    allowed = await world.reconcile(repair=True, most_deletes=1.0, patience=timedelta(0))
    assert allowed.repaired == (0 if removed else extras)


async def test_there_is_a_number_that_no_share_exceeds(primary: AsyncEngine) -> None:
    """R10: `most_deleted` counts over all tenants and types, and nothing is removed when they are more."""
    world = await opened(primary, tenants=["north", "south"])
    await execute(primary, "delete from note where number < '004'")
    found = await world.reconcile(repair=True, most_deleted=7, most_deletes=1.0)
    assert (found.extra, found.repaired, found.refused) == (8, 0, 8)
    assert await value(primary, DELETES) == 0


async def test_a_dry_run_says_how_many_and_records_nothing_but_that(primary: AsyncEngine) -> None:
    """R8, R10: events and deliveries stay as they were."""
    world = await opened(primary)
    await execute(primary, "delete from note where number < '030'")
    await execute(primary, "update note set content = :content where number = '035'", content=said("else"))
    events = await value(primary, "select count(*) from outbox")
    found = await world.reconcile()
    assert (found.extra, found.altered, found.repaired) == (30, 1, 0)
    assert await value(primary, "select count(*) from outbox") == events
    assert await value(primary, "select count(*) from outbox_delivery") == 0
    assert await value(primary, "select extra from outbox_reconciliation where not repair") == 30
