select tenant_id, resource_type, resource_id, operation, cast(content as text) as content, event_id
from "public".outbox
where tenant_id = $1
order by event_id
