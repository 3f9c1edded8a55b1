delete from "public".outbox_backfill where backend_id = $1
