"""Bulk: many resources in one transaction, one event each under one id, and what became of them."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox.event import StoredResource, SyncEvent
from outbox.level import connected
from outbox.record import record
from outbox.statement import Statement
from outbox.token import SyncToken

__all__ = ["BULK", "BULK_FAILED", "BulkStatus", "FailedResource", "bulk_statuses", "record_bulk"]

# Whom an event of the bulk is owed to is taken from the registry as it is now; whoever came later never was owed it.
_MEMBERS = """
with member as materialized (
    select event.event_id, event.tenant_id, event.resource_type, event.resource_id, event.created_at,
           cast(hashtextextended(event.tenant_id, 0) & 63 as smallint) as lane,
           hashtextextended(event.tenant_id || '/' || event.resource_type || '/' || event.resource_id, 0) as key_hash
    from {schema}.outbox as event where event.bulk_id = cast(:bulk_id as uuid)
), in_hand as materialized (
    select attempt.backend_id, unnest(attempt.event_ids) as event_id
    from {schema}.outbox_attempt as attempt where attempt.finished_at is null
), told as (
    select secondary.backend_id, member.event_id, member.resource_type, member.resource_id, hold.error_code,
           case when delivery.event_id is not null then 'pending'
                when hold.state in ('dead', 'retrying') then hold.state
                when hold.state is not null or in_hand.event_id is not null then 'pending'
                when exists (
                    select from {schema}.outbox_discarded as discarded
                    where discarded.backend_id = secondary.backend_id and discarded.key_hash = member.key_hash
                      and member.event_id between discarded.oldest_id and discarded.event_id
                    offset 0
                ) then 'discarded'
                else 'done' end as state
    from {schema}.outbox_secondary as secondary
    cross join member
    left join {schema}.outbox_delivery as delivery
      on delivery.backend_id = secondary.backend_id and delivery.lane = member.lane
     and delivery.event_id = member.event_id
    left join {schema}.outbox_hold as hold
      on hold.backend_id = secondary.backend_id and hold.key_hash = member.key_hash
     and hold.tenant_id = member.tenant_id and hold.resource_type = member.resource_type
     and hold.resource_id = member.resource_id and hold.page = 0 and hold.oldest_id <= member.event_id
    left join in_hand on in_hand.backend_id = secondary.backend_id and in_hand.event_id = member.event_id
    where secondary.status not in ('draining', 'removed') and secondary.registered_at <= member.created_at
      and (secondary.tenant_ids is null or member.tenant_id = any (secondary.tenant_ids))
      and (secondary.resource_types is null or member.resource_type = any (secondary.resource_types))
)
"""

BULK = Statement(
    _MEMBERS
    + """select backend_id, count(*) as events, count(*) filter (where state = 'done') as done,
       count(*) filter (where state = 'pending') as pending, count(*) filter (where state = 'retrying') as failing,
       count(*) filter (where state = 'dead') as dead, count(*) filter (where state = 'discarded') as discarded
from told group by backend_id order by backend_id
"""
)

BULK_FAILED = Statement(
    _MEMBERS
    + """select backend_id, resource_type, resource_id, state, error_code
from told where state in ('dead', 'retrying')
order by state, event_id
limit :most
"""
)

_PAGE = 1_000


class FailedResource(msgspec.Struct, frozen=True):
    """A resource of a bulk that a secondary does not have: `retrying`, or `dead`, with the code of its error."""

    resource_type: str
    resource_id: str
    state: str
    error_code: str | None


class BulkStatus(msgspec.Struct, frozen=True):
    """What became of a bulk on one secondary: exact counts of its events in one snapshot, and some that failed.

    `events` is the sum of `done`, `pending`, `failing`, `dead` and `discarded`; what was pruned since is not counted.
    """

    backend_id: str
    events: int
    done: int
    pending: int
    failing: int
    dead: int
    discarded: int
    failed: tuple[FailedResource, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the secondary has every resource of the bulk."""
        return self.done == self.events > 0


async def record_bulk(
    connection: AsyncConnection,
    schema: str,
    resources: Iterable[StoredResource] | AsyncIterable[StoredResource],
    *,
    tenant_id: str,
    bulk_id: UUID,
    headers: Mapping[str, str] | None = None,
) -> SyncToken:
    """Record an event for each resource as it comes, a thousand at a time, so that memory does not grow with them.

    Raises `InvalidEvent` at the first that is invalid or of another tenant: roll back, and nothing was written.
    """
    tokens: list[SyncToken] = []
    start = 0
    async for page in _pages(resources):
        events = SyncEvent.bulk(page, tenant_id=tenant_id, headers=headers, bulk_id=bulk_id, start=start)
        tokens.append(await record(connection, events, schema=schema))
        start += len(page)
    return SyncToken.merged(tokens)


async def bulk_statuses(engine: AsyncEngine, schema: str, bulk_id: UUID, most: int) -> list[BulkStatus]:
    """Return what became of a bulk on every secondary that was owed any of it and is, with up to `most` that failed."""
    parameters: dict[str, Any] = {"bulk_id": str(bulk_id)}
    async with connected(engine, "REPEATABLE READ") as connection:
        counts = (await connection.execute(text(BULK.on(schema)), parameters)).all()
        found = (await connection.execute(text(BULK_FAILED.on(schema)), {**parameters, "most": most})).all()
    failed = {row[0]: tuple(FailedResource(*each[1:]) for each in found if each[0] == row[0]) for row in counts}
    return [BulkStatus(**row._mapping, failed=failed[row[0]]) for row in counts]  # noqa: SLF001 - its public name


async def _pages(
    resources: Iterable[StoredResource] | AsyncIterable[StoredResource],
) -> AsyncIterator[list[StoredResource]]:
    page: list[StoredResource] = []
    async for resource in _each(resources):
        page.append(resource)
        if len(page) == _PAGE:
            yield page
            page = []
    if page:
        yield page


async def _each(
    resources: Iterable[StoredResource] | AsyncIterable[StoredResource],
) -> AsyncIterator[StoredResource]:
    if isinstance(resources, AsyncIterable):
        async for resource in resources:
            yield resource
    else:
        for resource in resources:
            yield resource
