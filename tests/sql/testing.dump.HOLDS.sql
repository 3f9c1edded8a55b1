select backend_id, tenant_id, resource_type, resource_id, state, event_ids, oldest_id, attempts
from "public".outbox_hold
order by backend_id, tenant_id, resource_type, resource_id
