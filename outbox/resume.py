"""Resume: take what is held and due, and let holds absorb the fresh deliveries of their keys.

The claim passes held keys by; this is the claim for when there are holds. It takes fresh deliveries too, so that a
secondary with failures is not served in two halves.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from outbox.lanes import Lanes
from outbox.statement import Statement
from outbox.turn import Turn

if TYPE_CHECKING:
    import asyncpg

__all__ = ["PAGE", "RESUME", "Resumed", "resume"]

# So many positions in a row, eight kilobytes, before the next row.
PAGE = 1_000

# busy      keys in some open attempt: nobody may start another event of them
# due       holds whose time has come; a suspect comes alone or not at all
# fresh     deliveries from each lane in turn, from its floor, in position order
# absorbed  what of fresh belongs to a key that is held back
# last      log order: where it goes, which is behind all that the key owes already
# appended  ... on a page with room or on a new one, so that a long line is never written anew for what joins it; of a
#           key that is due the hold itself changes here, and the next page may move in: neither is appended to
# touched   holds that are due or, in state order, absorb something: there the newer event has all its attempts before
#           it, and revives a dead key; in log order, with their next page unless more than a batch is left (in state
#           order there are none, unless it was log order before)
# pulled    ... which is no page any more
# share     log order: how many events of each taken hold fit into the batch
# divided   what goes out now and what stays; in state order only the newest event of a key does either
# kept      written back by key and not by place, so that a hand that changes a hold meanwhile cannot lose an event
# picked    the batch: what goes out of holds, and fresh deliveries of keys that are not held
# opened    the whole batch as one row; it is closed at once if the claim only let holds absorb
RESUME = Statement("""
with busy as materialized (
    select unnest(attempt.key_hashes) as key_hash
    from {schema}.outbox_attempt as attempt
    where attempt.backend_id = :backend_id and attempt.attempt_id > :folded_through and attempt.finished_at is null
), due as materialized (
    select hold.key_hash, hold.tenant_id, hold.resource_type, hold.resource_id
    from {schema}.outbox_hold as hold
    where hold.backend_id = :backend_id and hold.alone = cast(:alone as boolean) and hold.state <> 'behind'
      and hold.next_attempt_at <= statement_timestamp() and hold.key_hash not in (select key_hash from busy)
    order by hold.next_attempt_at
    limit cast(:batch_size as integer)
    for update skip locked
), fresh as materialized (
    select delivery.row_id, delivery.lane, delivery.event_id, delivery.key_hash
    from unnest(cast(:lanes as smallint[]), cast(:floors as bigint[]), cast(:shares as integer[]))
        as lane (lane, floor, share)
    cross join lateral (
        select delivery.ctid as row_id, delivery.lane, delivery.event_id, delivery.key_hash
        from {schema}.outbox_delivery as delivery
        where delivery.backend_id = :backend_id and delivery.lane = lane.lane and delivery.event_id > lane.floor
          and delivery.key_hash not in (select key_hash from busy)
        order by delivery.event_id
        limit lane.share
        for update skip locked
    ) as delivery
    limit (select greatest(cast(:batch_size as integer) - count(*), 0) from due)
), absorbed as materialized (
    select fresh.key_hash, hold.tenant_id, hold.resource_type, hold.resource_id,
           array_agg(fresh.event_id order by fresh.event_id) as event_ids,
           (fresh.key_hash, hold.tenant_id, hold.resource_type, hold.resource_id) in (select * from due) as is_due
    from fresh
    cross join lateral (
        select hold.tenant_id, hold.resource_type, hold.resource_id
        from {schema}.outbox_hold as hold
        where hold.backend_id = :backend_id and hold.key_hash = fresh.key_hash
          and (hold.tenant_id, hold.resource_type, hold.resource_id) = (
              select event.tenant_id, event.resource_type, event.resource_id
              from {schema}.outbox as event where event.event_id = fresh.event_id
          )
        order by hold.page
        limit 1
        for update
    ) as hold
    group by fresh.key_hash, hold.tenant_id, hold.resource_type, hold.resource_id
), last as materialized (
    select absorbed.*, last.page, last.event_ids as so_far,
           cardinality(last.event_ids) + cardinality(absorbed.event_ids) <= cast(:page_size as integer)
               and (not absorbed.is_due or exists (
                   select from {schema}.outbox_hold as next
                   where next.backend_id = :backend_id and next.key_hash = absorbed.key_hash
                     and next.tenant_id = absorbed.tenant_id and next.resource_type = absorbed.resource_type
                     and next.resource_id = absorbed.resource_id and next.page between 1 and last.page - 1
                   offset 0
               )) as has_room
    from absorbed
    cross join lateral (
        select hold.page, hold.event_ids
        from {schema}.outbox_hold as hold
        where hold.backend_id = :backend_id and hold.key_hash = absorbed.key_hash
          and hold.tenant_id = absorbed.tenant_id and hold.resource_type = absorbed.resource_type
          and hold.resource_id = absorbed.resource_id
        order by hold.page desc
        limit 1
    ) as last
    where cast(:log_order as boolean)
), appended as (
    insert into {schema}.outbox_hold as hold
        (backend_id, key_hash, tenant_id, resource_type, resource_id, page, event_ids, oldest_id, owed_since, state)
    select :backend_id, last.key_hash, last.tenant_id, last.resource_type, last.resource_id,
           case when has_room then last.page else last.page + 1 end,
           case when has_room then last.so_far || last.event_ids else last.event_ids end, last.event_ids[1],
           (select created_at from {schema}.outbox where event_id = last.event_ids[1]),
           case when has_room and last.page = 0 then 'released' else 'behind' end
    from last
    on conflict (backend_id, key_hash, tenant_id, resource_type, resource_id, page) do update
    set event_ids = excluded.event_ids
), touched as materialized (
    select hold.tenant_id, hold.resource_type, hold.resource_id, hold.key_hash, hold.next_attempt_at, hold.owed_since,
           hold.oldest_id,
           hold.event_ids || next.event_ids || coalesce(found.event_ids, '{}') as owed, next.row_ids as next_row_ids,
           found.is_due or (hold.state = 'dead' and renewed.is_new and not hold.alone) as taken,
           hold.state = 'dead' and renewed.is_new as revived,
           case when hold.state = 'dead' and renewed.is_new then 'released' else hold.state end as state,
           case when renewed.is_new then 0 else hold.attempts end as attempts,
           case when renewed.is_new then 0 else hold.lost end as lost,
           case when not renewed.is_new then hold.first_failed_at end as first_failed_at
    from (
        select coalesce(due.key_hash, absorbed.key_hash) as key_hash,
               coalesce(due.tenant_id, absorbed.tenant_id) as tenant_id,
               coalesce(due.resource_type, absorbed.resource_type) as resource_type,
               coalesce(due.resource_id, absorbed.resource_id) as resource_id,
               due.tenant_id is not null as is_due, absorbed.event_ids
        from due
        full join (select * from absorbed where not cast(:log_order as boolean)) as absorbed
          on absorbed.key_hash = due.key_hash and absorbed.tenant_id = due.tenant_id
         and absorbed.resource_type = due.resource_type and absorbed.resource_id = due.resource_id
    ) as found
    cross join lateral (
        select hold.*
        from {schema}.outbox_hold as hold
        where hold.backend_id = :backend_id and hold.key_hash = found.key_hash and hold.tenant_id = found.tenant_id
          and hold.resource_type = found.resource_type and hold.resource_id = found.resource_id and hold.page = 0
        offset 0
    ) as hold
    cross join lateral (
        select coalesce(array_agg(behind.row_id), '{}') as row_ids,
               array(
                   select unnest(each.event_ids) from {schema}.outbox_hold as each
                   where each.ctid = any (array_agg(behind.row_id)) order by 1
               ) as event_ids
        from (
            select behind.ctid as row_id
            from {schema}.outbox_hold as behind
            where behind.backend_id = :backend_id and behind.key_hash = found.key_hash
              and behind.tenant_id = found.tenant_id and behind.resource_type = found.resource_type
              and behind.resource_id = found.resource_id and behind.page > 0
              and not (cast(:log_order as boolean) and cardinality(hold.event_ids) > cast(:batch_size as integer))
            order by behind.page
            limit case when cast(:log_order as boolean) then 1 end
        ) as behind
    ) as next
    cross join lateral (
        select found.event_ids is not null as is_new
    ) as renewed
), pulled as (
    delete from {schema}.outbox_hold where ctid = any (array(select unnest(next_row_ids) from touched))
), share as materialized (
    select cast(greatest(1, (cast(:batch_size as integer) - (
               select count(*) from fresh where event_id not in (select unnest(event_ids) from absorbed)
           )) / greatest(1, count(*))) as integer) as events
    from touched where taken
), divided as materialized (
    select touched.*,
           case when not taken then '{}'
                when cast(:log_order as boolean) then owed[: share.events]
                else owed[cardinality(owed) :] end as going,
           case when cast(:log_order as boolean) then owed[case when taken then share.events else 0 end + 1 :]
                when taken then '{}'
                else owed[cardinality(owed) :] end as staying
    from touched cross join share
), kept as (
    insert into {schema}.outbox_hold as hold
        (backend_id, tenant_id, resource_type, resource_id, key_hash, event_ids, oldest_id, owed_since, state, attempts,
         lost, first_failed_at, next_attempt_at)
    select :backend_id, tenant_id, resource_type, resource_id, key_hash, staying, oldest_id,
           coalesce((select created_at from {schema}.outbox where event_id = staying[1]), owed_since),
           state, attempts, lost, first_failed_at,
           case when revived and not taken then statement_timestamp() when not taken then next_attempt_at end
    from divided
    on conflict (backend_id, key_hash, tenant_id, resource_type, resource_id, page) do update
    set event_ids = excluded.event_ids, owed_since = excluded.owed_since, state = excluded.state,
        attempts = excluded.attempts, lost = excluded.lost, first_failed_at = excluded.first_failed_at,
        next_attempt_at = excluded.next_attempt_at
), superseded as materialized (
    select coalesce(sum(cardinality(owed) - 1), 0) as deliveries from touched where not cast(:log_order as boolean)
), picked as materialized (
    select unnest(going) as event_id, key_hash, null as lane from divided
    union all
    select event_id, key_hash, lane
    from fresh where event_id not in (select unnest(event_ids) from absorbed)
), gone as (
    delete from {schema}.outbox_delivery where ctid = any (array(select row_id from fresh))
), opened as (
    insert into {schema}.outbox_attempt
        (backend_id, relay_id, event_ids, key_hashes, lease_until, finished_at, superseded)
    select :backend_id, cast(:relay_id as uuid),
           coalesce(array_agg(event_id order by event_id), '{}'), coalesce(array_agg(distinct key_hash), '{}'),
           clock_timestamp() + cast(:lease as interval), case when count(*) = 0 then clock_timestamp() end,
           (select deliveries from superseded)
    from picked
    having count(*) > 0 or (select deliveries from superseded) > 0
    returning attempt_id
)
select opened.attempt_id, picked.lane, count(*) as events
from opened cross join picked
group by opened.attempt_id, picked.lane
union all
select null, fresh.lane, count(*)
from fresh
where fresh.event_id in (select unnest(event_ids) from absorbed)
group by fresh.lane
""")


class Resumed(NamedTuple):
    """The attempt that was opened, None if nothing is due, and how many deliveries went into holds."""

    attempt_id: int | None
    absorbed: int


async def resume(
    connection: asyncpg.Connection[Any],
    schema: str,
    *,
    backend_id: str,
    relay_id: UUID,
    turn: Turn,
    batch_size: int,
    lanes: Lanes,
    lease: timedelta,
    alone: bool = False,
) -> Resumed:
    """Open an attempt with up to `batch_size` events, those of due holds first, and let holds absorb what is theirs.

    Runs in the transaction of `take_turn`. Suspects are taken only `alone`, one at a time.
    """
    asked = lanes.lined_first(0 if alone else batch_size)
    parameters = {
        "backend_id": backend_id,
        "relay_id": relay_id,
        "folded_through": turn.folded_through,
        "log_order": turn.log_order,
        "alone": alone,
        "batch_size": 1 if alone else batch_size,
        "page_size": PAGE,
        "lease": lease,
        "lanes": asked.lanes,
        "floors": asked.floors,
        "shares": asked.shares,
    }
    rows = await connection.fetch(*RESUME.arguments(schema, parameters))
    turn.check_opened([row[0] for row in rows if row[0] is not None])
    if not alone:
        lanes.lined = {row[1] for row in rows if row[0] is None}
        lanes.learn(asked, [row[1:] for row in rows], full=sum(row[2] for row in rows) >= batch_size)
    attempt_id = next((row[0] for row in rows if row[0] is not None), None)
    return Resumed(attempt_id, sum(row[2] for row in rows if row[0] is None))
