with suspect as materialized (
    select suspect.resource_id,
           hashtextextended(
               cast($1 as text) || '/' || cast($2 as text) || '/' || suspect.resource_id, 0
           ) as key_hash
    from unnest(cast($3 as text[])) as suspect (resource_id)
), owed as materialized (
    select delivery.key_hash from "public".outbox_delivery as delivery
    where delivery.backend_id = $4 and delivery.key_hash in (select key_hash from suspect)
    union all
    select unnest(attempt.key_hashes)
    from "public".outbox_secondary as secondary
    join "public".outbox_attempt as attempt
      on attempt.backend_id = secondary.backend_id and attempt.attempt_id > secondary.folded_through
    where secondary.backend_id = $4 and attempt.finished_at is null
    union all
    select hold.key_hash from "public".outbox_hold as hold where hold.backend_id = $4
), newest as materialized (
    select event.resource_id, max(event.event_id) as position
    from "public".outbox as event
    where event.tenant_id = $1 and event.resource_type = $2
      and event.resource_id in (select resource_id from suspect)
    group by event.resource_id
)
select suspect.resource_id, coalesce(newest.position, 0) as position,
       suspect.key_hash in (select key_hash from owed) as owed
from suspect left join newest on newest.resource_id = suspect.resource_id
