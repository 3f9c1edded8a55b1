with owed as materialized (
    select backend_id, event_id from "public".outbox_delivery where backend_id = any (cast($1 as text[]))
    union
    select backend_id, unnest(event_ids) from "public".outbox_attempt
    where backend_id = any (cast($1 as text[])) and finished_at is null
    union
    select backend_id, unnest(event_ids) from "public".outbox_hold where backend_id = any (cast($1 as text[]))
), numbered as materialized (
    select event.event_id, cast($2 as bigint) + row_number() over (order by event.event_id) as position
    from "public".outbox as event
    where event.event_id in (select event_id from owed) and event.event_id <= cast($2 as bigint)
), written as (
    insert into "public".outbox
        (event_id, tenant_id, resource_type, resource_id, operation, version, fhir_version, content, bulk_id, headers,
         created_at)
    overriding system value
    select numbered.position, event.tenant_id, event.resource_type, event.resource_id, event.operation, event.version,
           event.fhir_version, event.content, event.bulk_id, event.headers, event.created_at
    from numbered join "public".outbox as event on event.event_id = numbered.event_id
), fetched as (
    delete from "public".outbox_delivery
    where backend_id = any (cast($1 as text[])) and event_id in (select event_id from numbered)
), pulled as (
    delete from "public".outbox_hold where backend_id = any (cast($1 as text[])) and page > 0
), held as (
    insert into "public".outbox_hold as hold
        (backend_id, tenant_id, resource_type, resource_id, key_hash, event_ids, oldest_id, owed_since, state,
         next_attempt_at)
    select owed.backend_id, event.tenant_id, event.resource_type, event.resource_id,
           hashtextextended(event.tenant_id || '/' || event.resource_type || '/' || event.resource_id, 0),
           array_agg(numbered.position order by numbered.position), min(event.event_id), min(event.created_at),
           'released', statement_timestamp()
    from owed
    join numbered on numbered.event_id = owed.event_id
    join "public".outbox as event on event.event_id = owed.event_id
    group by owed.backend_id, event.tenant_id, event.resource_type, event.resource_id
    on conflict (backend_id, key_hash, tenant_id, resource_type, resource_id, page) do update
    set event_ids = excluded.event_ids
            || array(select later from unnest(hold.event_ids) as later where later > cast($2 as bigint)),
        oldest_id = least(hold.oldest_id, excluded.oldest_id), owed_since = least(hold.owed_since, excluded.owed_since)
)
select count(*) as events from numbered
