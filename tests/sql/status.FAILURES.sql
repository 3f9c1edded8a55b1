select backend_id, tenant_id, resource_type, resource_id, state, attempts, error_code, error,
       first_failed_at, last_failed_at, next_attempt_at, cardinality(event_ids) + (
           select coalesce(sum(cardinality(behind.event_ids)), 0)
           from "public".outbox_hold as behind
           where behind.backend_id = hold.backend_id and behind.key_hash = hold.key_hash
             and behind.tenant_id = hold.tenant_id and behind.resource_type = hold.resource_type
             and behind.resource_id = hold.resource_id and behind.page > 0
       ) as owed
from "public".outbox_hold as hold
where state in ('retrying', 'dead') and (cast($1 as text) is null or backend_id = $1)
order by state, last_failed_at
limit $2
