select event.tenant_id, event.resource_type, event.resource_id, event.operation,
       cast(event.content as text) as content, event.version,
       event.fhir_version, event.bulk_id, cast(event.headers as text) as headers, event.event_id,
       greatest(least(event.created_at, timestamptz '9999-01-01'), timestamptz '0001-01-02') as created_at
from "public".outbox as event
where event.event_id = any (cast((
    select attempt.event_ids from "public".outbox_attempt as attempt
    where attempt.backend_id = $1 and attempt.attempt_id = $2
      and attempt.relay_id = cast($3 as uuid) and attempt.finished_at is null
) as bigint[]))
