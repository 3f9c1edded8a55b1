with page as materialized (
    select delivery.ctid as row_id from "public".outbox_delivery as delivery
    where delivery.backend_id = $1
      and exists (
          select from "public".outbox_secondary as secondary
          where secondary.backend_id = $1 and secondary.status = 'removed'
      )
    order by delivery.lane, delivery.event_id
    limit $2
    for update
), gone as (
    delete from "public".outbox_delivery as delivery where delivery.ctid = any (array(select row_id from page))
    returning array[delivery.event_id] as event_ids
), lot as materialized (
    select event.key_hash, event.tenant_id, event.resource_type, event.resource_id, max(event.event_id) as event_id,
           min(event.event_id) as oldest_id, cast(count(*) as integer) as events, 0 as attempts,
           cast(null as text) as error_code
    from (select event_ids[1] as event_id from gone) as owed
    cross join lateral (
        select event.event_id, event.tenant_id, event.resource_type, event.resource_id,
               hashtextextended(event.tenant_id || '/' || event.resource_type || '/' || event.resource_id, 0)
                   as key_hash
        from "public".outbox as event where event.event_id = owed.event_id offset 0
    ) as event
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
