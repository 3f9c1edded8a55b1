with event as materialized (
    select case when pg_current_xact_id() is not null then nextval('"public".outbox_event_id_seq') end as event_id,
           cast(hashtextextended(cast($1 as text), 0) & 63 as smallint) as lane,
           hashtextextended(cast($1 as text) || '/' || cast($2 as text) || '/' || cast($3 as text), 0) as key_hash,
           pg_current_xact_id() as transaction_id, cast(extract(epoch from transaction_timestamp()) * 1000000 as bigint) as stamp,
           array(
    select secondary.backend_id
    from "public".outbox_secondary as secondary
    where secondary.status in ('shadow', 'live', 'paused')
      and (cast($4 as text[]) is null or secondary.backend_id = any (cast($4 as text[])))
      and (secondary.tenant_ids is null or cast($1 as text) = any (secondary.tenant_ids))
      and (secondary.resource_types is null or cast($2 as text) = any (secondary.resource_types))
           ) as owed_to
), written as (
    insert into "public".outbox
        (event_id, tenant_id, resource_type, resource_id, operation, version, fhir_version, content, bulk_id, headers,
         stamp)
    overriding system value
    select event_id, cast($1 as text), cast($2 as text), cast($3 as text), cast($5 as text),
           cast($6 as text), cast($7 as text), cast(cast($8 as text) as json),
           cast($9 as uuid), cast(cast($10 as text) as json), stamp
    from event
), owed as (
    insert into "public".outbox_delivery (backend_id, lane, event_id, key_hash)
    select unnest(owed_to), lane, event_id, key_hash from event
)
select event_id, owed_to, transaction_id, stamp from event
