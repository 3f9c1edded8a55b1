with in_hand as materialized (
    select unnest(attempt.event_ids) as event_id
    from "public".outbox_attempt as attempt
    where attempt.backend_id = $1 and attempt.finished_at is null
)
select secondary.status, secondary.tenant_ids, secondary.resource_types, array(
    select asked.event_id
    from unnest(cast($2 as bigint[])) as asked (event_id)
    cross join lateral (
        select cast(hashtextextended(event.tenant_id, 0) & 63 as smallint) as lane
        from "public".outbox as event where event.event_id = asked.event_id
        offset 0
    ) as event
    where exists (
        select from "public".outbox_delivery as delivery
        where delivery.backend_id = $1 and delivery.lane = event.lane and delivery.event_id = asked.event_id
        offset 0
    ) or asked.event_id in (select event_id from in_hand)
) as owed
from "public".outbox_secondary as secondary
where secondary.backend_id = $1
