select event.operation from "public".outbox as event
where event.tenant_id = $1 and event.resource_type = $2 and event.resource_id = $3
  and event.event_id < cast($4 as bigint)
order by event.event_id desc
limit 1
