"""Retire: write off what a removed secondary is still owed, a page at a time, so that nothing of it is left behind.

Whoever waits for such an event must not be told that it arrived: what is written off leaves a note, as what an operator
discards does. A page is one short transaction; one that is cut off is simply not done.
"""

from __future__ import annotations

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.statement import Statement
from outbox.turn import ALL_TURNS

__all__ = ["RETIRE_ATTEMPTS", "RETIRE_DELIVERIES", "RETIRE_HOLDS", "Removal", "retire"]

# One that is registered again meanwhile is owed what it is owed.
_REMOVED = """
      and exists (
          select from {schema}.outbox_secondary as secondary
          where secondary.backend_id = :backend_id and secondary.status = 'removed'
      )"""

_NOTED = """), noted as (
    insert into {schema}.outbox_discarded
        (backend_id, key_hash, event_id, oldest_id, tenant_id, resource_type, resource_id, events, attempts, error_code,
         reason)
    select :backend_id, key_hash, event_id, oldest_id, tenant_id, resource_type, resource_id, events, attempts,
           error_code, cast(:reason as text)
    from lot
), counted as (
    update {schema}.outbox_secondary as secondary set discarded = secondary.discarded + total.events
    from (select coalesce(sum(cardinality(event_ids)), 0) as events from gone) as total
    where secondary.backend_id = :backend_id and total.events > 0
)
select count(*) as touched, coalesce(sum(cardinality(event_ids)), 0) as events from gone
"""

_EVENT = """
    cross join lateral (
        select event.event_id, event.tenant_id, event.resource_type, event.resource_id,
               hashtextextended(event.tenant_id || '/' || event.resource_type || '/' || event.resource_id, 0)
                   as key_hash
        from {schema}.outbox as event where event.event_id = owed.event_id offset 0
    ) as event"""

# gone      what relays have in hand: whoever comes to settle it finds it closed, and changes nothing
# lot       its keys; of one that was held before only the hold knows the lowest position it stands for
RETIRE_ATTEMPTS = Statement(
    """
with page as materialized (
    select attempt.ctid as row_id
    from {schema}.outbox_attempt as attempt
    where attempt.backend_id = :backend_id and attempt.finished_at is null[removed]
    order by attempt.attempt_id
    limit :page_size
), gone as (
    update {schema}.outbox_attempt as attempt
    set finished_at = clock_timestamp(), released = cardinality(attempt.event_ids)
    where attempt.ctid = any (array(select row_id from page)) and attempt.finished_at is null
    returning attempt.event_ids
), lot as materialized (
    select event.key_hash, event.tenant_id, event.resource_type, event.resource_id, max(event.event_id) as event_id,
           least(min(event.event_id), min(hold.oldest_id)) as oldest_id, cast(count(*) as integer) as events,
           coalesce(max(hold.attempts), 0) as attempts, max(hold.error_code) as error_code
    from gone
    cross join lateral unnest(gone.event_ids) as owed (event_id)[event]
    left join lateral (
        select hold.oldest_id, hold.attempts, hold.error_code from {schema}.outbox_hold as hold
        where hold.backend_id = :backend_id and hold.key_hash = event.key_hash and hold.tenant_id = event.tenant_id
          and hold.resource_type = event.resource_type and hold.resource_id = event.resource_id and hold.page = 0
        offset 0
    ) as hold on true
    group by event.key_hash, event.tenant_id, event.resource_type, event.resource_id
""".replace("[event]", _EVENT).replace("[removed]", _REMOVED)
    + _NOTED
)

# What of a hold was in hand is noted by then.
RETIRE_HOLDS = Statement(
    """
with page as materialized (
    select hold.ctid as row_id from {schema}.outbox_hold as hold
    where hold.backend_id = :backend_id[removed]
    order by hold.key_hash
    limit :page_size
    for update
), gone as (
    delete from {schema}.outbox_hold as hold where hold.ctid = any (array(select row_id from page))
    returning hold.*
), lot as materialized (
    select key_hash, tenant_id, resource_type, resource_id, event_ids[cardinality(event_ids)] as event_id, oldest_id,
           cardinality(event_ids) as events, attempts, error_code
    from gone where event_ids <> '{}'
""".replace("[removed]", _REMOVED)
    + _NOTED
)

RETIRE_DELIVERIES = Statement(
    """
with page as materialized (
    select delivery.ctid as row_id from {schema}.outbox_delivery as delivery
    where delivery.backend_id = :backend_id[removed]
    order by delivery.lane, delivery.event_id
    limit :page_size
    for update
), gone as (
    delete from {schema}.outbox_delivery as delivery where delivery.ctid = any (array(select row_id from page))
    returning array[delivery.event_id] as event_ids
), lot as materialized (
    select event.key_hash, event.tenant_id, event.resource_type, event.resource_id, max(event.event_id) as event_id,
           min(event.event_id) as oldest_id, cast(count(*) as integer) as events, 0 as attempts,
           cast(null as text) as error_code
    from (select event_ids[1] as event_id from gone) as owed[event]
    group by event.key_hash, event.tenant_id, event.resource_type, event.resource_id
""".replace("[event]", _EVENT).replace("[removed]", _REMOVED)
    + _NOTED
)

_PAGE = 1_000


class Removal(msgspec.Struct, frozen=True):
    """What a removed secondary was still owed and will not get: in a relay's hand, held back, and never tried."""

    backend_id: str
    in_hand: int = 0
    held: int = 0
    waiting: int = 0

    @property
    def given_up(self) -> int:
        """How many deliveries that is, all together."""
        return self.in_hand + self.held + self.waiting


async def retire(engine: AsyncEngine, schema: str, backend_id: str, reason: str) -> Removal:
    """Write off all that is owed to a secondary whose status lets nobody claim for it, nor owe it anything more.

    Attempts come first: as long as one is open, its settle may hold a key back.
    """
    in_hand = await _all(engine, RETIRE_ATTEMPTS, schema, backend_id, reason)
    held = await _all(engine, RETIRE_HOLDS, schema, backend_id, reason)
    waiting = await _all(engine, RETIRE_DELIVERIES, schema, backend_id, reason)
    return Removal(backend_id, in_hand, held, waiting)


async def _all(engine: AsyncEngine, statement: Statement, schema: str, backend_id: str, reason: str) -> int:
    parameters = {"backend_id": backend_id, "reason": reason, "page_size": _PAGE}
    events = 0
    while True:
        async with engine.begin() as connection:
            # The registry before the holds, as whoever discards does.
            await connection.execute(text(ALL_TURNS.on(schema)), {"backend_id": backend_id})
            row = (await connection.execute(text(statement.on(schema)), parameters)).one()
        events += int(row.events)
        if not row.touched:
            return events
