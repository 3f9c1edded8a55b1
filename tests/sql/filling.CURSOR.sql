select after, finished_at is not null as finished
from "public".outbox_backfill
where backend_id = $1 and tenant_id = $2 and resource_type = $3
for update
