select backend_id, tenant_id, resource_type, resource_id, state, attempts, error_code, error,
       first_failed_at, last_failed_at, next_attempt_at, cardinality(event_ids) as owed
from "public".outbox_hold
where state in ('retrying', 'dead') and (cast($1 as text) is null or backend_id = $1)
order by state, last_failed_at
limit $2
