with writer as materialized (
    select pg_current_xact_id() as transaction_id, cast(extract(epoch from transaction_timestamp()) * 1000000 as bigint) as stamp,
           (cast($1 as text[]))[1] as tenant_id, (cast($2 as text[]))[1] as resource_type,
           (cast($3 as text[]))[1] as operation
), secondary as materialized (
    select secondary.backend_id, secondary.tenant_ids, secondary.resource_types
    from "public".outbox_secondary as secondary
    where secondary.status in ('shadow', 'live', 'paused')
      and (cast($4 as text[]) is null or secondary.backend_id = any (cast($4 as text[])))
), event as materialized (
    select nextval('"public".outbox_event_id_seq') as event_id,
           cast(hashtextextended(given.tenant_id, 0) & 63 as smallint) as lane,
           hashtextextended(given.tenant_id || '/' || given.resource_type || '/' || listed.resource_id, 0) as key_hash,
           given.tenant_id, given.resource_type, listed.resource_id, given.operation, listed.version,
           listed.fhir_version, listed.content, listed.bulk_id, listed.headers,
           writer.transaction_id, writer.stamp,
           array(select secondary.backend_id from secondary where (secondary.tenant_ids is null or given.tenant_id = any (secondary.tenant_ids))
      and (secondary.resource_types is null or given.resource_type = any (secondary.resource_types))) as owed_to
    from writer cross join unnest(
        cast($1 as text[]), cast($2 as text[]), cast($5 as text[]),
        cast($3 as text[]), cast($6 as text[]), cast($7 as text[]),
        cast($8 as text[]), cast($9 as uuid[]), cast($10 as text[])
    ) as listed (tenant_id, resource_type, resource_id, operation, version, fhir_version, content, bulk_id, headers)
    cross join lateral (
        select coalesce(listed.tenant_id, writer.tenant_id) as tenant_id,
               coalesce(listed.resource_type, writer.resource_type) as resource_type,
               coalesce(listed.operation, writer.operation) as operation
    ) as given
), written as (
    insert into "public".outbox
        (event_id, tenant_id, resource_type, resource_id, operation, version, fhir_version, content, bulk_id, headers,
         stamp)
    overriding system value
    select event_id, tenant_id, resource_type, resource_id, operation, version, fhir_version,
           cast(content as json), bulk_id, cast(headers as json), stamp
    from event
), owed as (
    insert into "public".outbox_delivery (backend_id, lane, event_id, key_hash)
    select owed.backend_id, event.lane, event.event_id, event.key_hash
    from event cross join unnest(event.owed_to) as owed (backend_id)
)
select array_agg(event_id) as event_ids, owed_to, transaction_id, stamp
from event
group by owed_to, transaction_id, stamp
