with forgotten as (
    delete from "public".outbox_backfill where backend_id = $1
)
update "public".outbox_secondary set status = 'removed'
where backend_id = $1
returning status
