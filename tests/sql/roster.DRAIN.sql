update "public".outbox_secondary set status = 'draining'
where backend_id = $1 and status in ('shadow', 'live', 'paused', 'draining')
returning status
