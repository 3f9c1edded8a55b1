update "public".outbox_secondary set status = 'removed'
where backend_id = $1
returning status
