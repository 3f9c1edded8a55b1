with in_hand as materialized (
    select attempt.backend_id, unnest(attempt.event_ids) as event_id
    from "public".outbox_attempt as attempt
    where attempt.finished_at is null and attempt.backend_id = any (cast($1 as text[]))
)
select asked.*, event.event_id is not null as known, event.stamp = asked.stamp as its_own,
       delivery.event_id is not null as waiting,
       (asked.backend_id, asked.event_id) in (select backend_id, event_id from in_hand) as in_hand,
       hold.state as hold, coalesce(hold.attempts, discarded.attempts, 0) as attempts,
       coalesce(hold.error_code, discarded.error_code) as error_code,
       discarded.event_id is not null as discarded, secondary.status
from unnest(cast($1 as text[]), cast($2 as bigint[]), cast($3 as bigint[]))
    as asked (backend_id, event_id, stamp)
left join "public".outbox_secondary as secondary on secondary.backend_id = asked.backend_id
left join lateral (
    select event.event_id, event.stamp, event.tenant_id, event.resource_type, event.resource_id,
           cast(hashtextextended(event.tenant_id, 0) & 63 as smallint) as lane,
           hashtextextended(event.tenant_id || '/' || event.resource_type || '/' || event.resource_id, 0) as key_hash
    from "public".outbox as event where event.event_id = asked.event_id offset 0
) as event on true
left join lateral (
    select delivery.event_id from "public".outbox_delivery as delivery
    where delivery.backend_id = asked.backend_id and delivery.lane = event.lane
      and delivery.event_id = asked.event_id
    offset 0
) as delivery on true
left join lateral (
    select hold.state, hold.attempts, hold.error_code from "public".outbox_hold as hold
    where hold.backend_id = asked.backend_id and hold.key_hash = event.key_hash and hold.tenant_id = event.tenant_id
      and hold.resource_type = event.resource_type and hold.resource_id = event.resource_id
      and hold.page = 0 and hold.oldest_id <= asked.event_id
    offset 0
) as hold on true
left join lateral (
    select discarded.event_id, discarded.attempts, discarded.error_code
    from "public".outbox_discarded as discarded
    where discarded.backend_id = asked.backend_id and discarded.key_hash = event.key_hash
      and asked.event_id between discarded.oldest_id and discarded.event_id
    limit 1
) as discarded on true
