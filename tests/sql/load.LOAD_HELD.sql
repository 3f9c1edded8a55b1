select hold.attempts, hold.lost, statement_timestamp() - hold.first_failed_at as failing_for, hold.oldest_id,
       event.tenant_id, event.resource_type, event.resource_id, event.operation,
       case when event.content_bytes <= cast($1 as bigint) / cardinality(attempt.event_ids) then cast(event.content as text) end as content,
       event.version, event.fhir_version, event.bulk_id, cast(event.headers as text) as headers, event.event_id,
       greatest(least(event.created_at, timestamptz '9999-01-01'), timestamptz '0001-01-02') as created_at,
       case when event.content_bytes > cast($1 as bigint) / cardinality(attempt.event_ids) then event.content_bytes end as left_out
from "public".outbox_attempt as attempt
cross join unnest(attempt.event_ids) as owed (event_id)
left join lateral (
    select * from "public".outbox as event where event.event_id = owed.event_id offset 0
) as event on true
left join lateral (
    select hold.attempts, hold.lost, hold.first_failed_at, hold.oldest_id
    from "public".outbox_hold as hold
    where hold.backend_id = $2
      and hold.key_hash = hashtextextended(event.tenant_id || '/' || event.resource_type || '/' || event.resource_id, 0)
      and hold.tenant_id = event.tenant_id
      and hold.resource_type = event.resource_type and hold.resource_id = event.resource_id and hold.page = 0
    offset 0
) as hold on true
where attempt.backend_id = $2 and attempt.attempt_id = $3
  and attempt.relay_id = cast($4 as uuid) and attempt.finished_at is null
