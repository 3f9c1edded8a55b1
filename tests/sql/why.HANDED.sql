with key as materialized (
    select hashtextextended(
               cast($1 as text) || '/' || cast($2 as text) || '/' || cast($3 as text), 0
           ) as key_hash
), found as materialized (
    select attempt.*
    from "public".outbox_secondary as secondary cross join key
    cross join lateral (
        select attempt.* from "public".outbox_attempt as attempt
        where attempt.backend_id = secondary.backend_id and attempt.finished_at is null
          and key.key_hash = any (attempt.key_hashes)
        offset 0
    ) as attempt
    union all
    select attempt.*
    from "public".outbox_secondary as secondary cross join key
    cross join lateral (
        select latest.*
        from (
            select attempt.* from "public".outbox_attempt as attempt
            where attempt.backend_id = secondary.backend_id
            order by attempt.attempt_id desc
            limit 20000
        ) as latest
        where latest.finished_at is not null and key.key_hash = any (latest.key_hashes)
        order by latest.attempt_id desc
        limit 100
    ) as attempt
)
select found.backend_id, found.attempt_id, found.relay_id, found.started_at, found.lease_until, found.finished_at,
       coalesce(mine.event_ids, '{}') as positions, cardinality(found.event_ids) as events, found.applied, found.stale,
       found.superseded, found.retried, found.rejected, found.released, found.lost, found.error_code
from found
cross join lateral (
    select array_agg(event.event_id order by event.event_id) as event_ids
    from "public".outbox as event
    where event.event_id = any (found.event_ids) and event.tenant_id = $1
      and event.resource_type = $2 and event.resource_id = $3
) as mine
order by found.backend_id, found.attempt_id desc
