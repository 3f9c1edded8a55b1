select exists (
    select from "public".outbox_secondary where backend_id = $1 and status in ('live', 'paused')
)
