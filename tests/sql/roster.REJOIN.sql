with again as (
    update "public".outbox_secondary set status = 'shadow', registered_at = clock_timestamp()
    where backend_id = $1 and status in ('draining', 'removed')
    returning backend_id
)
delete from "public".outbox_backfill where backend_id = any (array(select backend_id from again))
