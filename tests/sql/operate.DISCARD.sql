with gone as (
    delete from "public".outbox_hold as hold
    where 
    hold.state in ('retrying', 'dead') and (hold.state = 'dead' or hold.next_attempt_at is not null)
      and (cast($1 as text) is null or hold.backend_id = $1)
      and (cast($2 as text) is null or hold.tenant_id = $2)
      and (cast($3 as text) is null or hold.resource_type = $3)
      and (cast($4 as text) is null or hold.resource_id = $4)
      and (cast($5 as text) is null or hold.error_code = $5)
      and (cast($6 as text) is null or hold.state = $6)
    returning hold.backend_id, hold.key_hash, hold.tenant_id, hold.resource_type, hold.resource_id, hold.oldest_id,
              hold.event_ids, hold.attempts, hold.error_code
), noted as (
    insert into "public".outbox_discarded
        (backend_id, key_hash, event_id, oldest_id, tenant_id, resource_type, resource_id, events, attempts, error_code,
         reason)
    select backend_id, key_hash, event_ids[cardinality(event_ids)], oldest_id, tenant_id, resource_type, resource_id,
           cardinality(event_ids), attempts, error_code, cast($7 as text)
    from gone
), counted as (
    update "public".outbox_secondary as secondary set discarded = secondary.discarded + lot.events
    from (select backend_id, sum(cardinality(event_ids)) as events from gone group by backend_id) as lot
    where secondary.backend_id = lot.backend_id
)
select count(*) as keys from gone
