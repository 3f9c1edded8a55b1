with member as materialized (
    select event.event_id, event.tenant_id, event.resource_type, event.resource_id, event.created_at,
           cast(hashtextextended(event.tenant_id, 0) & 63 as smallint) as lane,
           hashtextextended(event.tenant_id || '/' || event.resource_type || '/' || event.resource_id, 0) as key_hash
    from "public".outbox as event where event.bulk_id = cast($1 as uuid)
), in_hand as materialized (
    select attempt.backend_id, unnest(attempt.event_ids) as event_id
    from "public".outbox_attempt as attempt where attempt.finished_at is null
), told as (
    select secondary.backend_id, member.event_id, member.resource_type, member.resource_id, hold.error_code,
           case when delivery.event_id is not null then 'pending'
                when hold.state in ('dead', 'retrying') then hold.state
                when hold.state is not null or in_hand.event_id is not null then 'pending'
                when exists (
                    select from "public".outbox_discarded as discarded
                    where discarded.backend_id = secondary.backend_id and discarded.key_hash = member.key_hash
                      and member.event_id between discarded.oldest_id and discarded.event_id
                    offset 0
                ) then 'discarded'
                else 'done' end as state
    from "public".outbox_secondary as secondary
    cross join member
    left join "public".outbox_delivery as delivery
      on delivery.backend_id = secondary.backend_id and delivery.lane = member.lane
     and delivery.event_id = member.event_id
    left join "public".outbox_hold as hold
      on hold.backend_id = secondary.backend_id and hold.key_hash = member.key_hash
     and hold.tenant_id = member.tenant_id and hold.resource_type = member.resource_type
     and hold.resource_id = member.resource_id and hold.page = 0 and hold.oldest_id <= member.event_id
    left join in_hand on in_hand.backend_id = secondary.backend_id and in_hand.event_id = member.event_id
    where secondary.status not in ('draining', 'removed') and secondary.registered_at <= member.created_at
      and (secondary.tenant_ids is null or member.tenant_id = any (secondary.tenant_ids))
      and (secondary.resource_types is null or member.resource_type = any (secondary.resource_types))
)
select backend_id, resource_type, resource_id, state, error_code
from told where state in ('dead', 'retrying')
order by state, event_id
limit $2
