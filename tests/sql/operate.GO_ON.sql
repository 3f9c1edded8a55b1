update "public".outbox_secondary set status = 'live'
where backend_id = $1 and status in ('live', 'paused')
returning status
