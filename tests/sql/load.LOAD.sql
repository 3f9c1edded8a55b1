with mine as materialized (
    select attempt.event_ids, cast($1 as bigint) / cardinality(attempt.event_ids) as share
    from "public".outbox_attempt as attempt
    where attempt.backend_id = $2 and attempt.attempt_id = $3
      and attempt.relay_id = cast($4 as uuid) and attempt.finished_at is null
)
select event.tenant_id, event.resource_type, event.resource_id, event.operation,
       case when event.content_bytes <= (select share from mine) then cast(event.content as text) end as content,
       event.version, event.fhir_version, event.bulk_id, cast(event.headers as text) as headers, event.event_id,
       greatest(least(event.created_at, timestamptz '9999-01-01'), timestamptz '0001-01-02') as created_at,
       case when event.content_bytes > (select share from mine) then event.content_bytes end as left_out
from "public".outbox as event
where event.event_id = any (cast((select event_ids from mine) as bigint[]))
