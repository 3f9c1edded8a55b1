with writer as materialized (
    select pg_current_xact_id() as transaction_id, cast(extract(epoch from transaction_timestamp()) * 1000000 as bigint) as stamp
), secondary as materialized (
    select secondary.backend_id, secondary.tenant_ids, secondary.resource_types
    from "public".outbox_secondary as secondary
    where secondary.status in ('shadow', 'live', 'paused')
      and (cast($1 as text[]) is null or secondary.backend_id = any (cast($1 as text[])))
), event as materialized (
    select nextval('"public".outbox_event_id_seq') as event_id,
           cast(hashtextextended(tenant_id, 0) & 63 as smallint) as lane,
           hashtextextended(tenant_id || '/' || resource_type || '/' || resource_id, 0) as key_hash,
           writer.transaction_id, writer.stamp, given.*,
           array(select secondary.backend_id from secondary where (secondary.tenant_ids is null or given.tenant_id = any (secondary.tenant_ids))
      and (secondary.resource_types is null or given.resource_type = any (secondary.resource_types))) as owed_to
    from writer cross join unnest(
        cast($2 as text[]), cast($3 as text[]), cast($4 as text[]),
        cast($5 as text[]), cast($6 as text[]), cast($7 as text[]),
        cast($8 as text[]), cast($9 as uuid[]), cast($10 as text[])
    ) as given (tenant_id, resource_type, resource_id, operation, version, fhir_version, content, bulk_id, headers)
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
