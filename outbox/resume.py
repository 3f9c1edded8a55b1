"""Resume: take what is held and due, and let holds absorb the fresh deliveries of their keys.

The claim passes held keys by; this is the claim for when there are holds. It takes fresh deliveries too, so that a
secondary with failures is not served in two halves.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from outbox.attempt import Attempt
from outbox.lanes import Lanes
from outbox.schema import Statement
from outbox.turn import Turn

if TYPE_CHECKING:
    import asyncpg

__all__ = ["RESUME", "resume"]

# busy      keys in some open attempt: nobody may start another event of them
# due       holds whose time has come; a suspect comes alone or not at all
# fresh     deliveries from each lane in turn, from its floor, in position order
# absorbed  what of fresh belongs to a key that is held back
# touched   holds taken now or absorbing something; a newer event revives a dead key, except in log order
# kept      ... written back: a hold in hand owes only what did not fit, in state order a waiting one only its newest
# picked    the batch: the taken holds' events, and fresh deliveries of keys that are not held
# opened    the whole batch as one row; it is closed at once if the claim only let holds absorb
RESUME = Statement("""
with busy as materialized (
    select unnest(attempt.key_hashes) as key_hash
    from {schema}.outbox_attempt as attempt
    where attempt.backend_id = :backend_id and attempt.attempt_id > :folded_through and attempt.finished_at is null
), due as materialized (
    select hold.tenant_id, hold.resource_type, hold.resource_id, true as is_due
    from {schema}.outbox_hold as hold
    where hold.backend_id = :backend_id and hold.next_attempt_at <= statement_timestamp()
      and hold.alone = cast(:alone as boolean) and hold.key_hash not in (select key_hash from busy)
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
    select event.tenant_id, event.resource_type, event.resource_id,
           array_agg(event.event_id order by event.event_id) as event_ids
    from fresh
    join {schema}.outbox_hold as hold on hold.backend_id = :backend_id and hold.key_hash = fresh.key_hash
    join {schema}.outbox as event on event.event_id = fresh.event_id and event.tenant_id = hold.tenant_id
     and event.resource_type = hold.resource_type and event.resource_id = hold.resource_id
    group by event.tenant_id, event.resource_type, event.resource_id
), touched as materialized (
    select hold.tenant_id, hold.resource_type, hold.resource_id, hold.key_hash, hold.attempts, hold.lost,
           hold.first_failed_at,
           hold.event_ids || coalesce(found.event_ids, '{}') as event_ids,
           hold.state = 'dead' and not cast(:log_order as boolean) as revived,
           found.is_due is not null or (hold.state = 'dead' and not cast(:log_order as boolean)) as taken
    from (
        select tenant_id, resource_type, resource_id, due.is_due, absorbed.event_ids
        from due full join absorbed using (tenant_id, resource_type, resource_id)
    ) as found
    join {schema}.outbox_hold as hold on hold.backend_id = :backend_id and hold.tenant_id = found.tenant_id
     and hold.resource_type = found.resource_type and hold.resource_id = found.resource_id
), kept as (
    update {schema}.outbox_hold as hold
    set event_ids = case
            when cast(:log_order as boolean) and touched.taken
                then touched.event_ids[cast(:batch_size as integer) + 1 :]
            when cast(:log_order as boolean) then touched.event_ids
            when touched.taken then '{}'
            else touched.event_ids[cardinality(touched.event_ids) :] end,
        state = case when touched.revived then 'released' else hold.state end,
        attempts = case when touched.revived then 0 else hold.attempts end,
        lost = case when touched.revived then 0 else hold.lost end,
        first_failed_at = case when touched.revived then null else hold.first_failed_at end,
        next_attempt_at = case when not touched.taken then hold.next_attempt_at end
    from touched
    where hold.backend_id = :backend_id and hold.tenant_id = touched.tenant_id
      and hold.resource_type = touched.resource_type and hold.resource_id = touched.resource_id
), superseded as materialized (
    select coalesce(sum(cardinality(event_ids) - 1), 0) as deliveries
    from touched where not taken and not cast(:log_order as boolean)
), picked as materialized (
    select unnest(
               case when cast(:log_order as boolean) then event_ids[: cast(:batch_size as integer)] else event_ids end
           ) as event_id,
           key_hash, null as lane,
           case when revived then 0 else attempts end as attempts,
           case when revived then 0 else lost end as lost,
           case when revived then null else first_failed_at end as first_failed_at
    from touched where taken
    union all
    select event_id, key_hash, lane, null, null, null
    from fresh where event_id not in (select unnest(event_ids) from absorbed)
), gone as (
    delete from {schema}.outbox_delivery as delivery using fresh where delivery.ctid = fresh.row_id
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
select opened.attempt_id, picked.lane, picked.attempts, picked.lost,
       statement_timestamp() - picked.first_failed_at as failing_for,
       event.tenant_id, event.resource_type, event.resource_id, event.operation,
       cast(event.content as text) as content, event.version,
       event.fhir_version, event.bulk_id, cast(event.headers as text) as headers, event.event_id,
       greatest(least(event.created_at, timestamptz '9999-01-01'), timestamptz '0001-01-02') as created_at
from opened cross join picked
left join {schema}.outbox as event on event.event_id = picked.event_id
order by event.event_id
""")


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
) -> Attempt | None:
    """Open an attempt with up to `batch_size` events, those of due holds first; None when nothing is due.

    Runs in the transaction of `take_turn`. Suspects are taken only `alone`, one at a time.
    """
    asked = lanes.shares(0 if alone else batch_size)
    parameters = {
        "backend_id": backend_id,
        "relay_id": relay_id,
        "folded_through": turn.folded_through,
        "log_order": turn.log_order,
        "alone": alone,
        "batch_size": 1 if alone else batch_size,
        "lease": lease,
        "lanes": asked.lanes,
        "floors": asked.floors,
        "shares": asked.shares,
    }
    rows = await connection.fetch(*RESUME.arguments(schema, parameters))
    if not alone:
        lanes.learn(asked, [row[1] for row in rows], full=len(rows) >= batch_size)
    if not rows:
        return None
    return Attempt.of_held(rows[0][0], backend_id, log_order=turn.log_order, rows=(row[2:] for row in rows))
