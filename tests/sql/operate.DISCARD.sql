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
    returning hold.*
), behind as (
    delete from "public".outbox_hold as behind
    using gone
    where behind.backend_id = gone.backend_id and behind.key_hash = gone.key_hash
      and behind.tenant_id = gone.tenant_id and behind.resource_type = gone.resource_type
      and behind.resource_id = gone.resource_id and behind.page > 0
    returning behind.*
), lot as materialized (
    select backend_id, key_hash, tenant_id, resource_type, resource_id, min(oldest_id) as oldest_id,
           max(event_ids[cardinality(event_ids)]) as event_id, cast(sum(cardinality(event_ids)) as integer) as events,
           max(attempts) as attempts, max(error_code) as error_code
    from (select * from gone union all select * from behind) as row
    group by backend_id, key_hash, tenant_id, resource_type, resource_id
), noted as (
    insert into "public".outbox_discarded
        (backend_id, key_hash, event_id, oldest_id, tenant_id, resource_type, resource_id, events, attempts, error_code,
         reason)
    select backend_id, key_hash, event_id, oldest_id, tenant_id, resource_type, resource_id, events, attempts,
           error_code, cast($7 as text)
    from lot
), counted as (
    update "public".outbox_secondary as secondary set discarded = secondary.discarded + given_up.events
    from (select backend_id, sum(events) as events from lot group by backend_id) as given_up
    where secondary.backend_id = given_up.backend_id
)
select count(*) as keys from lot
