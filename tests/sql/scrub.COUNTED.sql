select count(*) from "public".outbox as event
where event.tenant_id = $1 and event.resource_type = $2 and event.resource_id = $3
  and (event.headers is not null or cast(event.content as text) <> '{}')
