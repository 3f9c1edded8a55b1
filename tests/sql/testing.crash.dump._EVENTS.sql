select event_id, tenant_id, resource_type, resource_id, cast(content as text) as content
from "public".outbox order by event_id
