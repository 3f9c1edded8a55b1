with key as materialized (
    select cast(hashtextextended(cast($1 as text), 0) & 63 as smallint) as lane,
           hashtextextended(
               cast($1 as text) || '/' || cast($2 as text) || '/' || cast($3 as text), 0
           ) as key_hash
)
select secondary.backend_id, secondary.status, secondary.ordering,
       (secondary.tenant_ids is null or cast($1 as text) = any (secondary.tenant_ids))
           and (secondary.resource_types is null or cast($2 as text) = any (secondary.resource_types))
           as wanted,
       secondary.breaker, secondary.breaker_until, secondary.looked_at,
       greatest(statement_timestamp() - coalesce(secondary.looked_at, secondary.registered_at), interval '0')
           as silence, secondary.beyond,
       coalesce(fresh.event_ids, '{}') as pending, ahead.deliveries as ahead,
       hold.state, hold.positions, hold.attempts, hold.error_code, hold.error, hold.first_failed_at,
       hold.last_failed_at, hold.next_attempt_at
from "public".outbox_secondary as secondary cross join key
cross join lateral (
    select array_agg(delivery.event_id order by delivery.event_id) as event_ids
    from "public".outbox_delivery as delivery
    where delivery.backend_id = secondary.backend_id and delivery.lane = key.lane and delivery.key_hash = key.key_hash
      and exists (
          select from "public".outbox as event
          where event.event_id = delivery.event_id and event.tenant_id = $1
            and event.resource_type = $2 and event.resource_id = $3
          offset 0
      )
) as fresh
cross join lateral (
    select count(*) as deliveries
    from (
        select from "public".outbox_delivery as delivery
        where delivery.backend_id = secondary.backend_id and delivery.lane = key.lane
          and delivery.event_id < fresh.event_ids[1]
        limit 10000
    ) as delivery
) as ahead
left join lateral (
    select hold.*, array(
               select unnest(page.event_ids)
               from "public".outbox_hold as page
               where page.backend_id = secondary.backend_id and page.key_hash = key.key_hash
                 and page.tenant_id = $1 and page.resource_type = $2
                 and page.resource_id = $3
               order by 1
           ) as positions
    from "public".outbox_hold as hold
    where hold.backend_id = secondary.backend_id and hold.key_hash = key.key_hash and hold.tenant_id = $1
      and hold.resource_type = $2 and hold.resource_id = $3 and hold.page = 0
    offset 0
) as hold on true
order by secondary.backend_id
