select backend_id, tenant_id, resource_type, resource_id, oldest_id, event_id
from "public".outbox_discarded
order by backend_id, event_id
