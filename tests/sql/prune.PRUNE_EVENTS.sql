with head as materialized (
    select event.event_id, event.tenant_id, event.resource_type, event.resource_id,
           event.created_at not between statement_timestamp() - cast($1 as interval)
               and statement_timestamp() + cast($1 as interval) as old
    from "public".outbox as event
    where event.event_id > $2
    order by event.event_id
    limit $3
), page as materialized (
    select event_id, cast(hashtextextended(tenant_id, 0) & 63 as smallint) as lane,
           hashtextextended(tenant_id || '/' || resource_type || '/' || resource_id, 0) as key_hash
    from head
    where old
), secondary as materialized (
    select backend_id, folded_through from "public".outbox_secondary
), owed as materialized (
    select page.event_id
    from page cross join secondary
    cross join lateral (
        select from "public".outbox_delivery as delivery
        where delivery.backend_id = secondary.backend_id and delivery.lane = page.lane
          and delivery.event_id = page.event_id
        offset 0
    ) as delivery
    union all
    select attempt.event_id
    from secondary
    cross join lateral (
        select unnest(attempt.event_ids) as event_id
        from "public".outbox_attempt as attempt
        where attempt.backend_id = secondary.backend_id and attempt.attempt_id > secondary.folded_through
          and attempt.finished_at is null
    ) as attempt
    union all
    -- By key and not by event, and of a long line only the pages that are about these.
    select hold.event_id
    from (
        select key_hash, min(event_id) as first_id, max(event_id) as last_id from page group by key_hash
    ) as key cross join secondary
    cross join lateral (
        select unnest(hold.event_ids) as event_id
        from "public".outbox_hold as hold
        where hold.backend_id = secondary.backend_id and hold.key_hash = key.key_hash
          and hold.oldest_id <= key.last_id and hold.event_ids[cardinality(hold.event_ids)] >= key.first_id
        offset 0
    ) as hold
), gone as (
    delete from "public".outbox where event_id = any (
        array(select event_id from page where event_id not in (select event_id from owed))
    )
)
select coalesce(min(event_id) filter (where not old) - 1, max(event_id)) as through,
       coalesce(bool_and(old), false) and count(*) = $3 as more
from head
