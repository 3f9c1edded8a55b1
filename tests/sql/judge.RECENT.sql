select event.resource_id, array_agg(event.event_id order by event.event_id) as positions
from "public".outbox as event
where event.event_id > $1 and event.tenant_id = $2 and event.resource_type = $3
  and event.resource_id = any (cast($4 as text[]))
group by event.resource_id
