with page as materialized (
    select hold.ctid as row_id from "public".outbox_hold as hold
    where hold.backend_id = $1
      and exists (
          select from "public".outbox_secondary as secondary
          where secondary.backend_id = $1 and secondary.status = 'removed'
      )
    order by hold.key_hash
    limit $2
    for update
), gone as (
    delete from "public".outbox_hold as hold where hold.ctid = any (array(select row_id from page))
    returning hold.*
), lot as materialized (
    select key_hash, tenant_id, resource_type, resource_id, event_ids[cardinality(event_ids)] as event_id, oldest_id,
           cardinality(event_ids) as events, attempts, error_code
    from gone where event_ids <> '{}'
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
