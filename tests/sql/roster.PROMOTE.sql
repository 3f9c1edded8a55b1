update "public".outbox_secondary set status = 'live'
where backend_id = $1 and status in ('shadow', 'live')
returning status
