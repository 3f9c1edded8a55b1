select backend_id, role, mode, ordering, tenant_ids, resource_types, status
from "public".outbox_secondary
order by backend_id
