with page as materialized (
    select attempt.ctid as row_id
    from "public".outbox_attempt as attempt
    where attempt.backend_id = $1 and attempt.finished_at is null
      and exists (
          select from "public".outbox_secondary as secondary
          where secondary.backend_id = $1 and secondary.status = 'removed'
      )
    order by attempt.attempt_id
    limit $2
), gone as (
    update "public".outbox_attempt as attempt
    set finished_at = clock_timestamp(), released = cardinality(attempt.event_ids)
    where attempt.ctid = any (array(select row_id from page)) and attempt.finished_at is null
    returning attempt.event_ids
), lot as materialized (
    select event.key_hash, event.tenant_id, event.resource_type, event.resource_id, max(event.event_id) as event_id,
           least(min(event.event_id), min(hold.oldest_id)) as oldest_id, cast(count(*) as integer) as events,
           coalesce(max(hold.attempts), 0) as attempts, max(hold.error_code) as error_code
    from gone
    cross join lateral unnest(gone.event_ids) as owed (event_id)
    cross join lateral (
        select event.event_id, event.tenant_id, event.resource_type, event.resource_id,
               hashtextextended(event.tenant_id || '/' || event.resource_type || '/' || event.resource_id, 0)
                   as key_hash
        from "public".outbox as event where event.event_id = owed.event_id offset 0
    ) as event
    left join lateral (
        select hold.oldest_id, hold.attempts, hold.error_code from "public".outbox_hold as hold
        where hold.backend_id = $1 and hold.key_hash = event.key_hash and hold.tenant_id = event.tenant_id
          and hold.resource_type = event.resource_type and hold.resource_id = event.resource_id and hold.page = 0
        offset 0
    ) as hold on true
    group by event.key_hash, event.tenant_id, event.resource_type, event.resource_id
), noted as (
    insert into "public".outbox_discarded
        (backend_id, key_hash, event_id, oldest_id, tenant_id, resource_type, resource_id, events, attempts, error_code,
         reason)
    select $1, key_hash, event_id, oldest_id, tenant_id, resource_type, resource_id, events, attempts,
           error_code, cast($3 as text)
    from lot
), counted as (
    update "public".outbox_secondary as secondary set discarded = secondary.discarded + total.events
    from (select coalesce(sum(cardinality(event_ids)), 0) as events from gone) as total
    where secondary.backend_id = $1 and total.events > 0
)
select count(*) as touched, coalesce(sum(cardinality(event_ids)), 0) as events from gone
