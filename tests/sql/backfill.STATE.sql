select tenant_id, resource_type, recorded, refused, total, finished_at is not null as finished
from "public".outbox_backfill
where backend_id = $1
