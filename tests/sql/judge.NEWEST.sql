select event.resource_id, max(event.event_id) as position
from "public".outbox as event
where event.tenant_id = $1 and event.resource_type = $2
  and event.resource_id = any (cast($3 as text[]))
group by event.resource_id
